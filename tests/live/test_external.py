"""Ranks that are servers of their own, as behind an external load balancer: one board, one group.

Both servers are on this machine, on a core each; whoever sends a request chooses the engine. Their
rows also go to a router, which needs nothing of vLLM's.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gimbal.bench.servers import free_port
from gimbal.board.published import Source
from gimbal.core.snapshot import ACCEPTED_REQUESTS, Field
from gimbal.demo.manifest import load_manifest
from gimbal.integrations.rows import RowReader
from tests.live.client import burst, call
from tests.live.conftest import DemoServer
from tests.live.test_placement import CONFIG, DOMAIN_OF_ENGINE, EPLB, complete
from tests.waiting import until

pytestmark = [pytest.mark.live, pytest.mark.timeout(600)]
SECRET = "of this test and nobody else"
START_TIMEOUT_S = MOVE_TIMEOUT_S = 240.0


def command(rank: int, ports: dict[str, int], secret: Path) -> list[str]:
    """A server of one rank, on a core of its own where there are two."""
    gimbal = {
        "admin": True,
        "placement": CONFIG,
        "publish_to": f"@tcp://127.0.0.1:{ports['rows']}",
        "publish_name": "pair",
        "publish_secret_file": str(secret),
    }
    cores = sorted(os.sched_getaffinity(0))
    words = ["taskset", "-c", str(cores[rank % len(cores)])]
    words += [sys.executable, "-m", "gimbal.cli", "serve", "--demo"]
    words += ["--port", str(ports[f"rank {rank}"]), "--data-parallel-rank", str(rank)]
    words += ["--data-parallel-rpc-port", str(ports["group"])]
    words += ["--eplb-config", json.dumps(EPLB | {"use_async": False})]
    return [*words, "--additional-config", json.dumps({"gimbal": gimbal})]


@pytest.fixture(scope="module")
def ports() -> dict[str, int]:
    names = ("rank 0", "rank 1", "group", "rows")
    return {name: free_port() for name in names}


@pytest.fixture(scope="module")
def ranks(
    server_pool: Any, ports: dict[str, int], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[DemoServer]]:
    """Both servers, ready; stopped together, since neither steps without the other."""
    server_pool.stop()
    folder = tmp_path_factory.mktemp("ranks")
    secret = folder / "secret"
    secret.write_text(SECRET)
    servers: list[DemoServer] = []
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank in (0, 1):
            log = folder / f"rank-{rank}.log"
            with log.open("wb") as out:
                processes.append(
                    subprocess.Popen(command(rank, ports, secret), stdout=out, stderr=out)
                )
            url = f"http://127.0.0.1:{ports[f'rank {rank}']}/v1"
            servers.append(DemoServer(url, "gimbal-demo", processes[-1].pid, log))
        for server in servers:
            said(servers, "gimbal: ready in", server)
        yield servers
    finally:
        for process in processes:
            process.send_signal(signal.SIGTERM)
        codes = [process.wait(60) for process in processes]
    assert codes == [0, 0]


def said(servers: list[DemoServer], text: str, *by: DemoServer) -> None:
    """Returns once each of `by` has logged `text`; fails when one of `servers` has ended."""
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while not all(text in server.log.read_text(errors="replace") for server in by):
        logs = [server.log.read_text(errors="replace")[-3000:] for server in by]
        assert all(Path(f"/proc/{server.pid}").exists() for server in servers), logs
        assert time.monotonic() < deadline_s, logs
        time.sleep(0.2)


def test_both_ranks_share_a_board_and_each_shows_its_own_engine(ranks: list[DemoServer]) -> None:
    paths = set()
    for rank, server in enumerate(ranks):
        burst(server, 8)
        status = call(f"{server.root}/gimbal/status")
        paths.add(status["board"]["path"])
        assert [engine["engine"] for engine in status["engines"]] == [rank]
        assert status["dispatch"] is None
        assert list(server.metric_by_engine("gimbal_engine_snapshots_total")) == [str(rank)]
        log = server.log.read_text(errors="replace")
        assert "level cannot act: an external load balancer chooses the engine" in log
        with pytest.raises(urllib.error.HTTPError) as refused:
            call(f"{server.root}/gimbal/routing")
        assert refused.value.code == 409
    assert len(paths) == 1


def test_what_is_switched_on_one_server_holds_for_the_host(ranks: list[DemoServer]) -> None:
    call(f"{ranks[0].root}/gimbal/control", {"queue_ordering": "sjf"})
    for server in ranks:
        burst(server, 4)
    said(ranks, "Gimbal: queue ordering sjf", *ranks)
    call(f"{ranks[1].root}/gimbal/control", {"queue_ordering": "gimbal"})
    assert call(f"{ranks[0].root}/gimbal/status")["policies"]["ordering"] == "gimbal"


def test_a_router_reads_the_rows_of_both(ranks: list[DemoServer], ports: dict[str, int]) -> None:
    addresses = [f"tcp://127.0.0.1:{ports['rows'] + rank}" for rank in (0, 1)]
    sources = [Source("pair", 0), Source("pair", 1)]
    reader = RowReader(addresses, SECRET.encode())
    try:
        until(lambda: set(reader.sources()) == set(sources))
        before = reader.rows(sources)
        burst(ranks[1], 16)
        until(lambda: (reader.rows(sources)[:, Field.SEQUENCE] > before[:, Field.SEQUENCE]).all())
        grown = (reader.rows(sources) - before)[:, ACCEPTED_REQUESTS]
        assert grown.tolist() == [0.0, 16.0]
    finally:
        reader.close()


def test_experts_move_between_the_servers(ranks: list[DemoServer]) -> None:
    from gimbal.vllm_plugin.serve.plan import demo_model

    manifest, rng = load_manifest(demo_model()), np.random.default_rng(0)
    deadline_s = time.monotonic() + MOVE_TIMEOUT_S

    def moved(server: DemoServer) -> float:
        found = server.metrics().items()
        return sum(v for k, v in found if k.startswith("gimbal_placement_moved_experts_total"))

    while not all(moved(server) for server in ranks):
        assert time.monotonic() < deadline_s, "no experts moved"
        for rank, server in enumerate(ranks):
            for domain in DOMAIN_OF_ENGINE[rank]:
                complete(server, manifest.prompt(domain, 150, rng), rank, 24)
