"""One server over two hosts: signals and control between them, a link that fails, a head that ends.

The first host is this machine, the second a network namespace (`second_host`), one engine on each.
All tests but the first share one start.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gimbal.bench.servers import free_port
from gimbal.core.config import LEVELS
from gimbal.demo.manifest import load_manifest
from tests.left_over import gone
from tests.live.client import burst, call
from tests.live.conftest import DemoServer
from tests.live.second_host import FAR, FIRST, NEAR, SECOND, SecondHost, second_host
from tests.live.test_placement import CONFIG, EPLB, load

pytestmark = [pytest.mark.live, pytest.mark.hosts, pytest.mark.timeout(900)]
SERVE = (sys.executable, "-m", "gimbal.cli", "serve", "--demo")
START_TIMEOUT_S = MOVE_TIMEOUT_S = 600.0
LINK_DOWN_S = 5.0
"""Longer than dispatch trusts a row."""


@dataclass(frozen=True)
class Hosts:
    """A server over two hosts: the head's side, and `node`, the other's."""

    head: DemoServer
    node: DemoServer
    head_process: subprocess.Popen[bytes]
    node_process: subprocess.Popen[bytes]
    second: SecondHost

    def stale(self) -> float:
        """Decisions so far that were taken without the engines' rows."""
        return self.head.total("gimbal_dispatch_decisions_total", reason="stale")


def cores() -> tuple[str, str]:
    """Each host's half of the cores, for ``taskset``."""
    own = [str(core) for core in sorted(os.sched_getaffinity(0))]
    half = max(1, len(own) // 2)
    return ",".join(own[:half]), ",".join(own[half:] or own)


@contextmanager
def two_hosts(
    folder: Path, node_board_port: int | None = None, hybrid: bool = False
) -> Iterator[Hosts]:
    """Starts a server and waits until it is ready; ends what is left of it.

    Args:
        folder: for the logs.
        node_board_port: what the other node takes for the port of rows, if not the head's.
        hybrid: each host balances between two engines of its own; else the node is headless.
    """
    port, rpc_port, board_port = free_port(), free_port(), free_port()
    local = 2 if hybrid else 1
    node_role = ["--data-parallel-hybrid-lb", "--port", str(port)] if hybrid else ["--headless"]
    head_role = ["--data-parallel-hybrid-lb"] if hybrid else []

    def options(board_port: int) -> list[str]:
        gimbal = {"admin": True, "board_port": board_port, "placement": CONFIG}
        shared = ["--data-parallel-size", str(2 * local), "--data-parallel-size-local", str(local)]
        shared += ["--data-parallel-address", FIRST, "--data-parallel-rpc-port", str(rpc_port)]
        shared += ["--eplb-config", json.dumps(EPLB | {"use_async": False})]
        return [*shared, "--additional-config", json.dumps({"gimbal": gimbal})]

    def environment(address: str, link: str) -> dict[str, str]:
        return os.environ | {"VLLM_HOST_IP": address, "GLOO_SOCKET_IFNAME": link}

    def started(
        name: str, words: list[str], env: dict[str, str], address: str
    ) -> tuple[Any, DemoServer]:
        log = folder / f"{name}.log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                words, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT
            )
        processes.append(process)
        return process, DemoServer(f"http://{address}:{port}/v1", "gimbal-demo", process.pid, log)

    processes: list[subprocess.Popen[bytes]] = []
    with ExitStack() as stack:
        try:
            second = stack.enter_context(second_host())
        except OSError as error:
            pytest.skip(f"no second host can be made here: {error}")
        stack.callback(lambda: end(*processes))
        near, far = cores()
        words = ["taskset", "-c", near, *SERVE, "--port", str(port), *head_role]
        words += options(board_port)
        head_process, head = started("head", words, environment(FIRST, NEAR), "127.0.0.1")
        words = [*SERVE, *node_role, "--data-parallel-start-rank", str(local)]
        words += options(node_board_port or board_port)
        words = second.command("taskset", "-c", far, *words)
        node_process, node = started("node", words, environment(SECOND, FAR), SECOND)
        hosts = Hosts(head, node, head_process, node_process, second)
        said(hosts, head, "gimbal: ready in")
        said(hosts, node, "gimbal: ready in")
        yield hosts


def end(*processes: subprocess.Popen[bytes]) -> None:
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
    for process in processes:
        process.wait(60)


def said(hosts: Hosts, host: DemoServer, text: str, work: bool = False) -> str:
    """The line of `host`'s log that holds `text`, once it is there; with `work`, requests go on."""
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while True:
        log = host.log.read_text(errors="replace")
        if line := next((line for line in log.splitlines() if text in line), None):
            return line
        codes = hosts.head_process.poll(), hosts.node_process.poll()
        assert codes == (None, None), f"exit codes {codes}:\n{log[-4000:]}"
        assert time.monotonic() < deadline_s, f"{text!r} did not come:\n{log[-4000:]}"
        if work:
            burst(hosts.head, 4)
        time.sleep(0.1)


def test_a_port_that_does_not_match_is_named(server_pool: Any, tmp_path: Path) -> None:
    server_pool.stop()
    with two_hosts(tmp_path, node_board_port=free_port()) as hosts:
        line = said(hosts, hosts.head, "no row of it has come", work=True)
        assert "engine 1 has work" in line
        assert f"tcp://{FIRST}:" in line
        burst(hosts.head, 8)
        answer = call(f"{hosts.head.root}/gimbal/control", {"queue_ordering": "sjf"})
        assert (answer["followed"], answer["not_followed"]) == ([0], [1])


@pytest.fixture(scope="module")
def hosts(server_pool: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    server_pool.stop()
    with two_hosts(tmp_path_factory.mktemp("hosts")) as running:
        yield running


def test_dispatch_sees_the_engines_of_both_hosts(hosts: Hosts, capsys: Any) -> None:
    burst(hosts.head, 8)  # the first rows come
    before = hosts.stale()
    ages_ms: list[list[float]] = []

    def look() -> None:
        for _ in range(40):
            engines = call(f"{hosts.head.root}/gimbal/status")["engines"]
            ages_ms.append([engine["age_us"] / 1e3 for engine in engines])
            time.sleep(0.05)

    burst(hosts.head, 40, rate=20, meanwhile=look)
    with capsys.disabled():
        means = np.mean(ages_ms, axis=0)
        print(f"\nrows under load: {means[0]:.0f} ms old, of the other host {means[1]:.0f} ms")
    rows = hosts.head.metric_by_engine("gimbal_engine_snapshots_total")
    assert min(rows["0"], rows["1"]) > 10, rows
    served = hosts.head.metric_by_engine("vllm:request_success_total")
    assert min(served["0"], served["1"]) > 0, served
    assert hosts.stale() == before


def test_control_reaches_the_engine_of_the_other_host(hosts: Hosts) -> None:
    answer = call(f"{hosts.head.root}/gimbal/control", {"queue_ordering": "sjf"})
    assert (answer["followed"], answer["not_followed"]) == ([0, 1], [])
    said(hosts, hosts.node, "Gimbal: queue ordering sjf", work=True)
    call(f"{hosts.head.root}/gimbal/control", {"levels": ["dispatch", "placement"]})
    said(hosts, hosts.node, "Gimbal: queue ordering vllm", work=True)
    call(f"{hosts.head.root}/gimbal/control", {"levels": list(LEVELS)})


def test_experts_move_between_the_hosts(hosts: Hosts) -> None:
    from gimbal.vllm_plugin.serve.plan import demo_model

    manifest, rng = load_manifest(demo_model()), np.random.default_rng(0)
    deadline_s = time.monotonic() + MOVE_TIMEOUT_S
    while not hosts.head.total("gimbal_placement_commits_total"):  # of all ranks
        assert time.monotonic() < deadline_s, "no experts moved"
        load(hosts.head, manifest, rng)
    assert hosts.head.total("gimbal_placement_moved_experts_total") > 0
    pressure = hosts.head.metric_by_engine("gimbal_engine_expert_pressure_seconds")
    assert len(pressure) == 2
    assert max(pressure.values()) > 0.0


def test_a_link_that_fails_for_some_seconds_costs_no_request(hosts: Hosts, capsys: Any) -> None:
    before = hosts.stale()
    answers: list[dict[str, Any]] = []

    def fail() -> None:
        time.sleep(1.0)
        hosts.second.link("down")
        try:
            began_s = time.monotonic()
            control = {"queue_ordering": "hrrn"}
            answers.append(call(f"{hosts.head.root}/gimbal/control", control))
            time.sleep(max(0.0, LINK_DOWN_S - (time.monotonic() - began_s)))
        finally:
            hosts.second.link("up")

    began_s = time.monotonic()
    burst(hosts.head, 80, rate=10, meanwhile=fail)
    took_s = time.monotonic() - began_s
    after = hosts.stale()
    with capsys.disabled():
        print(
            f"\nlink down for {LINK_DOWN_S:.0f} s: 80 of 80 requests complete in {took_s:.1f} s, "
            f"{after - before:.0f} of them sent without rows"
        )
    assert after > before, "seconds without a row went unnoticed"
    assert answers[0]["not_followed"] == [1]
    said(hosts, hosts.node, "Gimbal: queue ordering hrrn", work=True)
    burst(hosts.head, 8)
    assert hosts.stale() == after


def test_a_headless_node_ends_with_its_head(hosts: Hosts) -> None:
    """Also without work, when its engine waits for nothing that the head does."""
    from gimbal.vllm_plugin.serve.processes import descendants_of
    from gimbal.vllm_plugin.serve.shared_memory import sweep

    time.sleep(3.0)
    head = [hosts.head.pid, *descendants_of(hosts.head.pid)]
    node = descendants_of(hosts.node.pid)
    for pid in head:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert gone(head, 60)
    assert hosts.node_process.wait(120) == 1
    last = hosts.node.log.read_text(errors="replace").splitlines()[-1]
    assert last.startswith("gimbal: ")
    assert " ended while running: " in last
    assert gone(sorted(node), 0)
    assert not hosts.second.run("ls", "/dev/shm")
    hosts.head_process.wait()
    sweep()  # of this host's, which had no time to
