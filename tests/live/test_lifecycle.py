"""A server stopped at any time leaves nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from gimbal.bench.servers import free_port
from tests.left_over import gone

pytestmark = [pytest.mark.live, pytest.mark.timeout(900)]
SERVE = [sys.executable, "-m", "gimbal.cli", "serve", "--demo"]
START_TIMEOUT_S = 600.0
"""Beside other work plain vLLM has taken more than 240 s; a server that ends is seen at once."""


@contextmanager
def running(
    command: list[str], log: Path, env: dict[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Starts `command`, and stops it should the test leave it running."""
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=env)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def wait_for(text: str, log: Path, process: subprocess.Popen[bytes]) -> None:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while text not in log.read_text(errors="replace"):
        assert process.poll() is None, log.read_text(errors="replace")[-4000:]
        assert time.monotonic() < deadline_s, f"{text!r} did not come"
        time.sleep(0.1)


@pytest.mark.parametrize("phase", ["importing vLLM", "starting the engines", "loading the model"])
def test_a_stop_while_starting_leaves_nothing(server_pool: Any, tmp_path: Path, phase: str) -> None:
    from gimbal.vllm_plugin.serve.processes import descendants_of
    from gimbal.vllm_plugin.serve.shared_memory import shared_memory_of

    server_pool.stop()
    log = tmp_path / "log"
    with running([*SERVE, "--port", str(free_port())], log) as process:
        wait_for(phase, log, process)
        time.sleep(0.5)
        family = descendants_of(process.pid)
        shared = shared_memory_of(family)
        assert family
        process.send_signal(signal.SIGINT)
        assert process.wait(40) == 0
    assert gone(family, 0)
    assert not [path for path in shared if path.exists()]


def test_a_start_that_fails_leaves_nothing(server_pool: Any, tmp_path: Path) -> None:
    """Engines that are up when they find no room for the KV cache have queues in /dev/shm."""
    from gimbal.vllm_plugin.serve.processes import descendants_of
    from gimbal.vllm_plugin.serve.shared_memory import shared_memory_of

    server_pool.stop()
    log = tmp_path / "log"
    flags = ["--port", str(free_port()), "--kv-cache-memory-bytes", "4096"]
    family: set[int] = set()
    shared: set[Path] = set()
    with running([*SERVE, *flags], log) as process:
        while process.poll() is None:
            family.update(now := descendants_of(process.pid))
            shared |= shared_memory_of(now)
            time.sleep(0.1)
    assert process.returncode == 1, log.read_text(errors="replace")[-4000:]
    assert len(shared) >= 2
    assert gone(sorted(family), 5)
    assert not [path for path in shared if path.exists()]


def test_a_killed_supervisor_takes_its_server_along(server: Any, server_pool: Any) -> None:
    from gimbal.vllm_plugin.serve.processes import descendants_of

    family = descendants_of(server.pid)
    assert len(family) >= 6
    os.kill(server.pid, signal.SIGKILL)
    assert gone(family, 40)
    server_pool.forget()


@pytest.mark.parametrize(
    ("title", "name"),
    [
        ("VLLM::Worker_DP1", "worker rank 0 of engine 1"),
        ("VLLM::DPCoordinator", "coordinator"),
        ("serve.server", "API server"),
    ],
)
def test_a_killed_process_is_named_and_nothing_is_left(
    server: Any, server_pool: Any, title: str, name: str
) -> None:
    from gimbal.vllm_plugin.serve.processes import descendants_of
    from gimbal.vllm_plugin.serve.shared_memory import shared_memory_of

    family = descendants_of(server.pid)
    shared = shared_memory_of(family)
    victim = next(pid for pid in family if title in command_line(pid))
    os.kill(victim, signal.SIGKILL)
    assert server_pool.process.wait(90) == 1
    server_pool.forget()
    lines = [t for t in server.log.read_text(errors="replace").splitlines() if "gimbal: " in t]
    assert lines[-1].startswith(f"gimbal: {name} (process {victim}) ended while running: killed by")
    assert gone(family, 0)
    assert not [path for path in shared if path.exists()]


def command_line(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()


def test_an_engine_that_dies_while_starting_leaves_nothing(
    server_pool: Any, tmp_path: Path
) -> None:
    from gimbal.vllm_plugin.serve.processes import descendants_of
    from gimbal.vllm_plugin.serve.shared_memory import shared_memory_of

    server_pool.stop()
    log = tmp_path / "log"
    with running([*SERVE, "--port", str(free_port())], log) as process:
        wait_for("loading the model", log, process)
        family = descendants_of(process.pid)
        shared = shared_memory_of(family)
        engine = next(pid for pid in family if "EngineCore_DP0" in command_line(pid))
        os.kill(engine, signal.SIGKILL)
        deadline_s = time.monotonic() + 90
        while process.poll() is None:
            shared |= shared_memory_of(descendants_of(process.pid))
            assert time.monotonic() < deadline_s, "it does not end"
            time.sleep(0.1)
    assert process.returncode == 1
    last = log.read_text(errors="replace").splitlines()[-1]
    assert last.startswith(f"gimbal: engine 0 (process {engine}) ended while "), last
    assert gone(family, 0)
    assert shared
    assert not [path for path in shared if path.exists()]


def test_the_next_start_removes_what_a_crash_left(server: Any, server_pool: Any) -> None:
    from gimbal.vllm_plugin.serve.processes import descendants_of
    from gimbal.vllm_plugin.serve.shared_memory import shared_memory_of, sweep

    family = [server.pid, *descendants_of(server.pid)]
    shared = shared_memory_of(family)
    for pid in family:
        os.kill(pid, signal.SIGKILL)
    assert gone(family, 40)
    server_pool.forget()
    assert [path for path in shared if path.exists()]
    assert sweep()
    assert not [path for path in shared if path.exists()]
