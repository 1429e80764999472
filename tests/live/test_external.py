"""Ranks that are servers of their own, as behind an external load balancer: one board, one group.

Both are on this machine, on a core each: started one by one, or by vLLM's supervisor of several
ports. Whoever sends a request chooses the engine; rows go to a router that needs nothing of vLLM's.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gimbal.bench.servers import free_port
from gimbal.board.published import Source
from gimbal.commands.stats import fetch
from gimbal.core.snapshot import ACCEPTED_REQUESTS, Field
from gimbal.demo.manifest import load_manifest
from gimbal.integrations.rows import RowReader
from tests.live.client import burst, call
from tests.live.conftest import DemoServer, two_free_ports
from tests.live.test_placement import CONFIG, DOMAIN_OF_ENGINE, EPLB, complete
from tests.waiting import until

pytestmark = [pytest.mark.live, pytest.mark.timeout(600)]
SECRET = "of this test and nobody else"
START_TIMEOUT_S = MOVE_TIMEOUT_S = 240.0
SUPERVISED = ("--data-parallel-multi-port-external-lb", "--data-parallel-size-local", "2")


@dataclass(frozen=True)
class Ranks:
    """Servers of one rank each, in their order.

    Attributes:
        processes: what was started, with its log: each of them, or what starts both.
        rows: port where the first engine publishes, the second's is the next.
    """

    servers: list[DemoServer]
    processes: dict[Path, subprocess.Popen[bytes]]
    rows: int

    def said(self, text: str, times: int = 2) -> None:
        """Returns once the logs hold `text` as often as asked; fails when a process has ended."""
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while True:
            logs = [log.read_text(errors="replace") for log in self.processes]
            if sum(log.count(text) for log in logs) >= times:
                return
            ended = [process.poll() for process in self.processes.values()]
            assert not any(code is not None for code in ended), [log[-3000:] for log in logs]
            assert time.monotonic() < deadline_s, [text, *(log[-3000:] for log in logs)]
            time.sleep(0.2)


def start(folder: Path, flags: list[str], core: int | None = None) -> tuple[Path, Any]:
    """A demo server, on one core where there are two and one is named."""
    cores = sorted(os.sched_getaffinity(0))
    words = [] if core is None else ["taskset", "-c", str(cores[core % len(cores)])]
    words += [sys.executable, "-m", "gimbal.cli", "serve", "--demo", *flags]
    log = folder / f"log-{core}"
    with log.open("wb") as out:
        return log, subprocess.Popen(words, stdout=out, stderr=out)


@pytest.fixture(scope="module", params=["a server each", "one supervisor"])
def ranks(
    request: Any, server_pool: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Ranks]:
    """Both ready; stopped together, since neither steps without the other."""
    server_pool.stop()
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "secret").write_text(SECRET)
    first, rows = two_free_ports(), two_free_ports()
    gimbal = {
        "admin": True,
        "placement": CONFIG,
        "publish_to": f"@tcp://127.0.0.1:{rows}",
        "publish_name": "pair",
        "publish_secret_file": str(folder / "secret"),
    }
    flags = ["--data-parallel-rpc-port", str(free_port())]
    flags += ["--eplb-config", json.dumps(EPLB | {"use_async": False})]
    flags += ["--additional-config", json.dumps({"gimbal": gimbal})]
    if request.param == "one supervisor":
        started = [start(folder, [*flags, "--port", str(first), *SUPERVISED])]
    else:
        started = [
            start(
                folder,
                [*flags, "--port", str(first + rank), "--data-parallel-rank", str(rank)],
                rank,
            )
            for rank in (0, 1)
        ]
    processes = dict(started)
    try:
        servers = [
            DemoServer(f"http://127.0.0.1:{first + rank}/v1", "gimbal-demo", process.pid, log)
            for rank, (log, process) in zip((0, 1), 2 * started, strict=False)
        ]
        found = Ranks(servers, processes, rows)
        found.said("gimbal: ready in", times=len(processes))
        yield found
    finally:
        for process in processes.values():
            process.send_signal(signal.SIGTERM)
        codes = [process.wait(60) for process in processes.values()]
    assert not any(codes), codes


def test_both_ranks_share_a_board_and_each_shows_its_own_engine(ranks: Ranks) -> None:
    paths = set()
    for rank, server in enumerate(ranks.servers):
        burst(server, 8)
        status = call(f"{server.root}/gimbal/status")
        paths.add(status["board"]["path"])
        assert [engine["engine"] for engine in status["engines"]] == [rank]
        assert status["dispatch"] is None
        assert list(server.metric_by_engine("gimbal_engine_snapshots_total")) == [str(rank)]
        routing = fetch(server.root, timeout_s=60.0)
        assert routing.metadata["answered"] == [rank]
        assert len(routing.counts) == 1
    assert len(paths) == 1
    ranks.said("level cannot act: an external load balancer chooses the engine")


def test_what_is_switched_on_one_server_holds_for_the_host(ranks: Ranks) -> None:
    first, second = ranks.servers
    call(f"{first.root}/gimbal/control", {"queue_ordering": "sjf"})
    for server in ranks.servers:
        burst(server, 4)
    ranks.said("Gimbal: queue ordering sjf")
    call(f"{second.root}/gimbal/control", {"queue_ordering": "gimbal"})
    assert call(f"{first.root}/gimbal/status")["policies"]["ordering"] == "gimbal"


def test_a_router_reads_the_rows_of_both(ranks: Ranks) -> None:
    addresses = [f"tcp://127.0.0.1:{ranks.rows + rank}" for rank in (0, 1)]
    sources = [Source("pair", 0), Source("pair", 1)]
    reader = RowReader(addresses, SECRET.encode())
    try:
        until(lambda: set(reader.sources()) == set(sources))
        before = reader.rows(sources)
        burst(ranks.servers[1], 16)
        until(lambda: (reader.rows(sources)[:, Field.SEQUENCE] > before[:, Field.SEQUENCE]).all())
        grown = (reader.rows(sources) - before)[:, ACCEPTED_REQUESTS]
        assert grown.tolist() == [0.0, 16.0]
    finally:
        reader.close()


def test_experts_move_between_the_servers(ranks: Ranks) -> None:
    from gimbal.vllm_plugin.serve.plan import demo_model

    manifest, rng = load_manifest(demo_model()), np.random.default_rng(0)
    deadline_s = time.monotonic() + MOVE_TIMEOUT_S
    name = "gimbal_placement_moved_experts_total"
    while not all(server.total(name) for server in ranks.servers):
        assert time.monotonic() < deadline_s, "no experts moved"
        for rank, server in enumerate(ranks.servers):
            for domain in DOMAIN_OF_ENGINE[rank]:
                complete(server, manifest.prompt(domain, 150, rng), rank, 24)
