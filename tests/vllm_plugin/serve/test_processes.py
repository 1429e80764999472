"""Ending a family of processes, run in a process of its own: it adopts and ends descendants."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

pytest.importorskip("psutil")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux only")


def run(body: str) -> str:
    script = "import os, signal, subprocess, sys, time\nfrom multiprocessing import shared_memory\n"
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


def test_semaphores_of_a_killed_process_are_removed() -> None:
    holder = (
        "import multiprocessing as m, time; from multiprocessing import resource_tracker as r;"
        "lock = m.get_context('spawn').Lock(); name = lock._semlock.name;"
        "r.unregister(name, 'semaphore');"
        "print(name[1:], flush=True); time.sleep(60)"
    )
    out = run(f"""
        processes.adopt_orphans()
        command = [sys.executable, "-c", {holder!r}]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        path = "/dev/shm/sem." + child.stdout.readline().strip()
        there = os.path.exists(path)
        os.kill(child.pid, signal.SIGSTOP)
        processes.end_all(child.pid, 0.3)
        print(there, os.path.exists(path))
    """)
    assert out == "True False"


def test_shared_memory_of_a_killed_process_is_removed() -> None:
    holder = (
        "from multiprocessing import resource_tracker, shared_memory as s; import time;"
        "m = s.SharedMemory(create=True, size=4096);"
        # Without the tracker nobody but end_all would remove it.
        "resource_tracker.unregister(m._name, 'shared_memory');"
        "print(m.name, flush=True); time.sleep(60)"
    )
    out = run(f"""
        processes.adopt_orphans()
        command = [sys.executable, "-c", {holder!r}]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        path = "/dev/shm/" + child.stdout.readline().strip()
        there = os.path.exists(path)
        processes.end_all(child.pid, 1.0)
        print(there, os.path.exists(path))
    """)
    assert out == "True False"
