"""The zygote with stand-ins for vLLM's modules, run in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from gimbal.vllm_plugin.cpu_backend.zygote import openmp_cores

SCRIPT = """
import multiprocessing, os, sys
from gimbal.vllm_plugin.cpu_backend import zygote

def told(pid, code):
    with open("told", "a") as file:
        file.write(f"{pid} {code}\\n")

def grandchild(queue):
    queue.put((os.getpid(), os.environ["WHO"], "loaded_before_the_fork" in sys.modules))

def child(queue):
    os.environ["WHO"] = "grandchild"
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=grandchild, args=(queue,), daemon=True)
    process.start()
    process.join()
    queue.put((os.getpid(), "exit", process.exitcode))

if __name__ == "__main__":
    assert zygote.start(["loaded_before_the_fork", "no.such.module"], on_exit=told)
    os.environ["WHO"] = "child"
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=child, args=(queue,))
    process.start()
    rows = [queue.get(timeout=30) for _ in range(2)]
    process.join()
    print(process.exitcode, [row[1:] for row in rows], len({os.getpid(), *(r[0] for r in rows)}))
    killed = context.Process(target=os.abort)
    killed.start()
    killed.join()
    with open("told") as file:
        codes = dict(map(int, line.split()) for line in file)
    print([codes.get(pid) for pid in (process.pid, rows[0][0], killed.pid)])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux only")
def test_spawned_processes_are_forks_with_their_starters_environment(tmp_path: Path) -> None:
    (tmp_path / "loaded_before_the_fork.py").write_text("")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(script)],
        env={
            "PYTHONPATH": f"{tmp_path}:{Path.cwd()}",
            "PATH": "/usr/bin:/bin",
            "TMPDIR": str(tmp_path),
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["0 [('grandchild', True), ('exit', 0)] 3", "[0, 0, -6]"]


@pytest.mark.parametrize(
    ("environment", "cores"),
    [
        ({"OMP_NUM_THREADS": "1"}, []),
        ({"GOMP_CPU_AFFINITY": "0 3"}, [0, 3]),
        ({"OMP_PLACES": "{2,3}", "OMP_PROC_BIND": "true"}, [2, 3]),
        ({"KMP_AFFINITY": "granularity=fine,explicit,proclist=[1,2]"}, [1, 2]),
    ],
)
def test_cores_from_vllms_openmp_variables(environment: dict[str, str], cores: list[int]) -> None:
    assert openmp_cores(environment) == cores
