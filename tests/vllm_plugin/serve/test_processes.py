"""Ending a family of processes, run in a process of its own: it adopts and ends descendants."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

pytest.importorskip("psutil")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux only")


def run(body: str) -> str:
    script = "import os, signal, subprocess, sys, time\n"
    script += "from gimbal.vllm_plugin.serve import processes\n" + textwrap.dedent(body)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
# A parent that starts a stubborn child and dies of SIGTERM at once, leaving it an orphan.
PARENT = (
    "import subprocess, sys, time;"
    f"subprocess.Popen([sys.executable, '-c', {STUBBORN!r}]); time.sleep(60)"
)


def test_orphans_that_ignore_sigterm_are_ended_too() -> None:
    out = run(f"""
        processes.adopt_orphans()
        child = subprocess.Popen([sys.executable, "-c", {PARENT!r}], start_new_session=True)
        while len(processes.descendants()) < 2:
            time.sleep(0.05)
        family = processes.descendants()
        time.sleep(0.5)
        processes.end_all(child.pid, 2.0)
        print(len(family), [pid for pid in family if os.path.exists(f"/proc/{{pid}}")])
    """)
    assert out == "2 []"


def test_a_resource_tracker_may_clean_up_before_it_is_ended() -> None:
    holder = (
        "import multiprocessing as m, time; lock = m.get_context('spawn').Lock();"
        "print(lock._semlock.name[1:], flush=True); time.sleep(60)"
    )
    out = run(f"""
        processes.adopt_orphans()
        command = [sys.executable, "-c", {holder!r}]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        path = "/dev/shm/sem." + child.stdout.readline().strip()
        there = os.path.exists(path)
        os.kill(child.pid, signal.SIGKILL)
        processes.end_all(child.pid, 0.3)
        print(there, os.path.exists(path), processes.descendants())
    """)
    assert out == "True False []"


def test_a_tracker_that_does_not_end_is_ended() -> None:
    # A process outside the family that holds the pipe keeps the tracker alive.
    tracker = "import time; time.sleep(60) # multiprocessing.resource_tracker"
    out = run(f"""
        processes.TRACKER_GRACE_S = 0.2
        processes.adopt_orphans()
        child = subprocess.Popen([sys.executable, "-c", {tracker!r}])
        processes.end_all(child.pid, 0.1)
        print(processes.descendants())
    """)
    assert out == "[]"


def test_which_processes_listen() -> None:
    out = run("""
        import socket
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            print(processes.listens([os.getpid()], port), processes.listens([os.getppid()], port))
    """)
    assert out == "True False"
