"""Processes of a matrix of runs."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.left_over import gone

RUN = """
import json, os, signal, sys, time
from gimbal.sim.cells import completed

def task(seconds):
    os.write(1, f"{os.getpid()}\\n".encode())  # whole lines, two processes write
    time.sleep(seconds)
    return seconds

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    tasks = [float(a) for a in sys.argv[1:]]
    print(json.dumps([result for _, result in completed(task, tasks, 2)]))
"""


def start(folder: Path, *seconds: str) -> subprocess.Popen[str]:
    script = folder / "run.py"
    script.write_text(RUN, encoding="utf-8")
    command = [sys.executable, str(script), *seconds]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_a_killed_run_leaves_no_workers(tmp_path):
    process = start(tmp_path, "60", "60")
    assert process.stdout is not None
    workers = [int(process.stdout.readline()) for _ in range(2)]
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert gone(workers, 20)


def test_an_interrupted_run_starts_nothing_more(tmp_path):
    process = start(tmp_path, *["0.2"] * 60)
    assert process.stdout is not None
    first = [process.stdout.readline() for _ in range(2)]
    process.send_signal(signal.SIGTERM)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    # Two ran, and the pool hands out a few ahead of time.
    assert len(first) + len(rest.splitlines()) < 12


def test_workers_end_with_a_run_that_ends(tmp_path):
    output, _ = start(tmp_path, "0.1", "0").communicate(timeout=60)
    assert sorted(json.loads(output.splitlines()[-1])) == [0.0, 0.1]
