"""One running demo server for all live tests.

A test asks for the fixture `server` and gets the plain ``gimbal serve --demo``. A test that needs
other flags says so, at the price of another start (about a minute):

    @pytest.mark.server("--tensor-parallel-size", "2", levels="none")
    def test_something(server: DemoServer) -> None: ...

Tests are sorted so that those with equal flags share one server; `operated` is one that many can
share. Every stop checks that no process and no shared-memory file of the server is left.
"""

from __future__ import annotations

import inspect
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from gimbal.bench.servers import free_port

READY_TIMEOUT_S = 240.0
STOP_TIMEOUT_S = 60.0
Key = tuple[tuple[str, ...], str | None, tuple[tuple[str, str], ...]]


def two_free_ports() -> int:
    """The first of two neighbouring ports that nobody uses.

    Below those that the system gives to whoever asks for any: vLLM's processes ask for many before
    the second engine binds its own.
    """
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = random.randrange(lowest // 2, lowest - 1)
        with socket.socket() as first, socket.socket() as second:
            try:
                first.bind(("", port))
                second.bind(("", port + 1))
            except OSError:
                continue
            return port


operated = pytest.mark.server(
    *("--additional-config", '{"gimbal": {"admin": true}}'),
    "--kv-events-config",
    json.dumps({"enable_kv_cache_events": True, "endpoint": f"tcp://*:{two_free_ports()}"}),
    env={"VLLM_SERVER_DEV_MODE": "1"},
)
"""A server that may be switched and paused, and whose caches tell what they hold."""


def server_key(item: pytest.Item) -> Key:
    mark = item.get_closest_marker("server")
    if mark is None:
        return (), None, ()
    environment = mark.kwargs.get("env") or {}
    return tuple(mark.args), mark.kwargs.get("levels"), tuple(sorted(environment.items()))


def ends_it(item: pytest.Item) -> int:
    """0 if a test leaves its server running, 1 if it ends it, 2 if it has servers of its own.

    The test's own parameters tell: `fixturenames` holds `server_pool` for every test of a server.
    """
    names = inspect.signature(item.function).parameters.keys()  # type: ignore[attr-defined]
    if not names.isdisjoint(("hosts", "hybrid", "ranks")):  # servers of their modules
        return 2
    if "server_pool" not in names:
        return 0
    return 1 if "server" in names else 2


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Groups live tests by server, the plain one last; other tests keep their place.

    Within a group, tests that end the server come after those that leave it running.
    """
    here = Path(__file__).parent
    places = [i for i, item in enumerate(items) if item.path.is_relative_to(here)]
    live = sorted((items[i] for i in places), key=lambda i: (repr(server_key(i)), ends_it(i)))
    for place, item in zip(places, live, strict=True):
        items[place] = item


@dataclass(frozen=True)
class DemoServer:
    """A running server: `url` ends in ``/v1``, `pid` is the supervisor's."""

    url: str
    model: str
    pid: int
    log: Path

    @property
    def root(self) -> str:
        return self.url.removesuffix("/v1")

    def metrics(self) -> dict[str, float]:
        """Every sample of ``/metrics`` by its full name, labels included."""
        with urllib.request.urlopen(f"{self.root}/metrics", timeout=10) as reply:
            text = reply.read().decode()
        samples = (line.rsplit(" ", 1) for line in text.splitlines() if line[:1] not in ("", "#"))
        return {name: float(value) for name, value in samples}

    def total(self, name: str, **labels: str) -> float:
        """Sum of the samples of metric `name` that carry `labels`."""
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        return sum(
            value
            for sample, value in self.metrics().items()
            if sample.partition("{")[0] == name and all(label in sample for label in wanted)
        )

    def metric_by_engine(self, name: str) -> dict[str, float]:
        """Sum of the samples of metric `name` per value of its label ``engine``."""
        found: dict[str, float] = {}
        for sample, value in self.metrics().items():
            if sample.partition("{")[0] == name and 'engine="' in sample:
                engine = sample.partition('engine="')[2].partition('"')[0]
                found[engine] = found.get(engine, 0.0) + value
        return found


class ServerPool:
    """At most one server at a time: two would share the cores and slow both down."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.key: Key | None = None
        self.server: DemoServer | None = None
        self.process: subprocess.Popen[bytes] | None = None

    def get(self, key: Key) -> DemoServer:
        alive = self.process is not None and self.process.poll() is None
        if key != self.key or not alive:
            self.stop()
            self.start(key)
        assert self.server is not None
        return self.server

    def forget(self) -> None:
        """For a test that ended the server itself."""
        if self.process is not None:
            self.process.wait(STOP_TIMEOUT_S)
        self.process = self.key = self.server = None

    def start(self, key: Key) -> None:
        flags, levels, environment = key
        port = free_port()
        log = self.folder / f"server-{port}.log"
        command = [sys.executable, "-m", "gimbal.cli", "serve", "--demo", "--port", str(port)]
        command += ["--levels", levels] if levels is not None else []
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                [*command, *flags],
                env=os.environ | dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        self.key = key
        self.server = DemoServer(
            f"http://127.0.0.1:{port}/v1", "gimbal-demo", self.process.pid, log
        )
        deadline_s = time.monotonic() + READY_TIMEOUT_S
        while "gimbal: ready in" not in log.read_text(errors="replace"):
            if self.process.poll() is not None or time.monotonic() > deadline_s:
                self.process.kill()
                tail = log.read_text(errors="replace")[-6000:]
                pytest.fail(f"the demo server did not become ready; its log ends:\n{tail}")
            time.sleep(0.25)

    def stop(self) -> None:
        """Stops the server and fails unless it left nothing behind."""
        process, self.process, self.key = self.process, None, None
        if process is None:
            return
        from gimbal.vllm_plugin.serve.processes import descendants_of
        from gimbal.vllm_plugin.serve.shared_memory import shared_memory_of

        family = [process.pid, *descendants_of(process.pid)]
        shared = shared_memory_of(family)
        was_running = process.poll() is None
        process.send_signal(signal.SIGTERM)
        code = process.wait(STOP_TIMEOUT_S)
        left = [pid for pid in family if Path(f"/proc/{pid}").exists()]
        files = [path for path in shared if path.exists()]
        assert was_running, f"the server ended by itself, exit code {code}"
        assert code == 0, f"exit code {code} after SIGTERM"
        assert not left, f"processes left behind: {left}"
        assert not files, f"shared memory left behind: {files}"


@pytest.fixture(scope="session")
def server_pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerPool]:
    pool = ServerPool(tmp_path_factory.mktemp("servers"))
    yield pool
    pool.stop()


@pytest.fixture
def server(server_pool: ServerPool, request: pytest.FixtureRequest) -> DemoServer:
    """The demo server with the flags of the test's ``server`` mark."""
    return server_pool.get(server_key(request.node))
