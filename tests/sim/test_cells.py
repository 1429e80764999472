"""Processes of a matrix of runs."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.left_over import gone

pytestmark = pytest.mark.timeout(600)

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
    process = start(tmp_path, "600", "600", *["0"] * 58)
    assert process.stdout is not None
    assert all(process.stdout.readline() for _ in range(2))
    process.send_signal(signal.SIGTERM)
    rest, _ = process.communicate(timeout=300)
    assert process.returncode != 0
    assert rest == ""


def test_workers_end_with_a_run_that_ends(tmp_path):
    output, _ = start(tmp_path, "0.1", "0").communicate(timeout=300)
    assert sorted(json.loads(output.splitlines()[-1])) == [0.0, 0.1]


TASKS = """
import os, signal, sys, time
from contextlib import closing
from multiprocessing.connection import Connection
from pathlib import Path
from gimbal.sim.cells import completed

def half(pipe, answer):
    os.write(pipe.fileno(), bytes(answer)[: len(answer) // 2])
    Path("half").touch()
    time.sleep(600)

def task(name):
    if name == "wrong":
        raise ValueError("wrong, as asked")
    if name == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if name == "half":
        while not Path("begun").exists():
            time.sleep(0.01)
        Connection._send = half
        return bytes(1000)
    return name

if __name__ == "__main__":
    with closing(completed(task, sys.argv[1:], 2)) as done:
        print(next(done), flush=True)
        Path("begun").touch()
        while "half" in sys.argv and not Path("half").exists():
            time.sleep(0.01)
        for result in done if "half" not in sys.argv else ():
            print(result, flush=True)
"""


def run_tasks(folder: Path, *names: str) -> subprocess.CompletedProcess[str]:
    (folder / "tasks.py").write_text(TASKS, encoding="utf-8")
    command = [sys.executable, "tasks.py", *names]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


def test_a_worker_that_is_ended_amid_its_answer_does_not_keep_the_run(tmp_path):
    done = run_tasks(tmp_path, "plain", "half")
    assert (done.returncode, done.stdout, done.stderr) == (0, "(0, 'plain')\n", "")


def test_a_worker_that_dies_ends_the_run(tmp_path):
    done = run_tasks(tmp_path, "plain", "plain", "dies")
    assert done.returncode == 1
    assert done.stderr.endswith("RuntimeError: the process that ran task 2 has ended\n")


def test_what_a_task_raises_is_raised_with_its_place(tmp_path):
    done = run_tasks(tmp_path, "plain", "plain", "wrong")
    assert done.returncode == 1
    assert "ValueError: wrong, as asked\n" in done.stderr
    assert 'raise ValueError("wrong, as asked")' in done.stderr


def test_more_processes_than_tasks(tmp_path):
    assert run_tasks(tmp_path, "plain").stdout == "(0, 'plain')\n"
