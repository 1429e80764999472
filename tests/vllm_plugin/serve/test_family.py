"""Who ended first, from what the server's processes note and from the processes themselves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gimbal.vllm_plugin.serve import family
from gimbal.vllm_plugin.serve.family import Ended, Family

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux only")
SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[bytes]]]:
    started = [subprocess.Popen(SLEEP) for _ in range(3)]
    yield started
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def wake() -> Iterator[int]:
    read, write = os.pipe()
    yield read
    os.close(read)
    os.close(write)


def end(process: subprocess.Popen[bytes], number: int = signal.SIGKILL) -> None:
    """Kills it and leaves the zombie: its parent has not asked yet."""
    process.send_signal(number)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)


@pytest.fixture(params=["with pidfd", "without"])
def any_kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "without":

        def missing(pid: int) -> int:
            raise OSError(38, "Function not implemented")

        monkeypatch.setattr(os, "pidfd_open", missing)


@pytest.mark.usefixtures("any_kernel")
def test_the_first_to_end_is_blamed_and_its_code_comes_from_who_knows_it(
    processes: list[subprocess.Popen[bytes]], wake: int, tmp_path: Path
) -> None:
    server, engine, worker = processes
    reports = tmp_path / "reports"
    watched = Family(server.pid, reports)
    watched.wait(0.0, wake)
    with reports.open("w", buffering=1) as file:
        file.write(f"started {engine.pid} {server.pid} EngineCore\n")
        file.write(f"started {worker.pid} {engine.pid} VllmWorker-1\nnonsense\nstarted 5")
        watched.wait(0.0, wake)
        assert watched.first_failure(None) is None
        end(worker)
        watched.wait(0.0, wake)
        end(engine, signal.SIGTERM)
        watched.wait(0.0, wake)
        blamed = watched.first_failure(1)
        assert blamed == Ended("worker rank 1 of engine 0", worker.pid, -9)
        # A worker whose parent collected it first.
        file.write(f"6 {engine.pid} VllmWorker-2\nended 56 3\n")
    assert watched.first_failure(None) == blamed
    watched.close()


@pytest.mark.usefixtures("any_kernel")
def test_of_two_that_end_at_once_the_deeper_one_is_blamed(
    processes: list[subprocess.Popen[bytes]], wake: int, tmp_path: Path
) -> None:
    server, engine, worker = processes
    reports = tmp_path / "reports"
    reports.write_text(
        f"started {engine.pid} {server.pid} EngineCore_DP3\n"
        f"started {worker.pid} {engine.pid} VllmWorker-0\n"
    )
    watched = Family(server.pid, reports)
    for process in processes:
        end(process)
    watched.wait(0.0, wake)
    assert str(watched.first_failure(-9)) == f"worker rank 0 of engine 3 (process {worker.pid})"


def test_exit_code_0_is_no_failure_and_an_unknown_one_is(
    processes: list[subprocess.Popen[bytes]], wake: int, tmp_path: Path
) -> None:
    server, gone, retired = processes
    for process in (gone, retired):
        process.kill()
        process.wait()
    reports = tmp_path / "reports"
    reports.write_text(
        f"started {retired.pid} {server.pid} EngineCore_DP1\nended {retired.pid} 0\n"
    )
    watched = Family(server.pid, reports)
    watched.wait(0.0, wake)
    assert watched.first_failure(None) is None
    with reports.open("a") as file:
        file.write(f"started {gone.pid} {server.pid} VLLM_DP_Coordinator\n")
    watched.wait(0.0, wake)  # reads who there is
    watched.wait(0.0, wake)
    failed = watched.first_failure(None)
    assert failed is not None
    assert (str(failed), failed.how) == (
        f"coordinator (process {gone.pid})",
        "exit code unknown",
    )


def test_a_process_without_the_variable_notes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(family.REPORTS, raising=False)
    family.note_started(1, "EngineCore")
    family.note_children()
    assert not hasattr(family.popen_fork.Popen, "gimbal_notes")


@pytest.mark.parametrize(
    ("code", "how"), [(3, "exit code 3"), (-11, "killed by SIGSEGV"), (-99, "killed by signal 99")]
)
def test_how(code: int, how: str) -> None:
    assert Ended("engine 0", 1, code).how == how
