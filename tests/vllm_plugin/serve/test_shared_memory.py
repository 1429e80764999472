"""Whose files in /dev/shm are whose: a family of processes beside other programs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing import resource_tracker, shared_memory
from pathlib import Path

import pytest

pytest.importorskip("psutil")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux only")

# A supervisor that does a step per line it reads and answers with a line.
SUPERVISOR = """
import os, signal, subprocess, sys
from gimbal.vllm_plugin.serve import processes, shared_memory

processes.adopt_orphans()
shared = shared_memory.SharedMemory(processes.descendants)
child = subprocess.Popen(
    [sys.executable, "-c", sys.argv[1]], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
)
for line in sys.stdin:
    step, _, rest = line.strip().partition(" ")
    if step == "look":
        shared.look()
    elif step == "kill":
        child.kill()
        child.wait()
    elif step == "end":
        processes.end_all(child.pid, 0.1, shared.look)
        shared.remove()
    elif step == "child":
        child.stdin.write(rest + chr(10))
        child.stdin.flush()
        rest = child.stdout.readline().strip()
    print(rest or step, flush=True)
"""
CHILD = """
import mmap, sys
from multiprocessing import resource_tracker, shared_memory
kept = []
for line in sys.stdin:
    step, _, name = line.strip().partition(" ")
    if step == "make":
        kept.append(shared_memory.SharedMemory(create=True, size=4096))
        name = kept[-1].name
        resource_tracker.unregister("/" + name, "shared_memory")  # nobody but us removes it
    else:
        with open("/dev/shm/" + name, "r+b") as file:
            kept.append(mmap.mmap(file.fileno(), 0))
    print(name, flush=True)
"""


class Supervisor:
    """Runs `SUPERVISOR` with a child that makes and maps segments."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", SUPERVISOR, CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self, step: str) -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(step + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline().strip()
        assert answer, "the supervisor ended"
        return answer


@pytest.fixture
def supervisor() -> Iterator[Supervisor]:
    started = Supervisor()
    yield started
    started("end")
    started.process.communicate(timeout=30)


@pytest.fixture
def foreign() -> Iterator[list[shared_memory.SharedMemory]]:
    """Segments that the test, another program to the server, has made."""
    made: list[shared_memory.SharedMemory] = []
    yield made
    for segment in made:
        segment.close()
        if there(segment.name):
            segment.unlink()
        else:
            resource_tracker.unregister("/" + segment.name, "shared_memory")


def segment() -> shared_memory.SharedMemory:
    return shared_memory.SharedMemory(create=True, size=4096)


def there(name: str) -> bool:
    return (Path("/dev/shm") / name).exists()


def listed(supervisor: Supervisor) -> list[Path]:
    """Lists that `supervisor` has in /dev/shm."""
    folder = Path(f"/proc/{supervisor.process.pid}/fd")
    targets = [Path(os.readlink(path)) for path in folder.iterdir()]
    return [path for path in targets if path.name.endswith(".files")]


def test_what_the_server_made_goes_and_so_does_the_list(supervisor: Supervisor) -> None:
    name = supervisor("child make")
    supervisor("look")
    (entry,) = listed(supervisor)
    assert name in entry.read_text()
    supervisor("end")
    assert not there(name)
    assert not entry.exists()


def test_what_a_killed_process_made_goes(supervisor: Supervisor) -> None:
    name = supervisor("child make")
    supervisor("look")
    supervisor("kill")
    assert there(name)
    supervisor("end")
    assert not there(name)


def test_what_was_there_before_stays(foreign: list[shared_memory.SharedMemory]) -> None:
    foreign.append(segment())
    supervisor = Supervisor()
    supervisor("child map " + foreign[0].name)
    supervisor("look")
    supervisor("end")
    assert there(foreign[0].name)
    supervisor.process.communicate(timeout=30)


def test_what_another_program_makes_meanwhile_stays(
    supervisor: Supervisor, foreign: list[shared_memory.SharedMemory]
) -> None:
    supervisor("child make")  # the supervisor has looked about before
    foreign += [segment(), segment()]
    supervisor("child map " + foreign[0].name)
    supervisor("look")
    supervisor("child map " + foreign[1].name)  # known by then
    for one in foreign:
        one.close()  # whose it is was settled when it was first seen
    supervisor("end")
    assert [there(one.name) for one in foreign] == [True, True]


def test_what_another_program_still_uses_stays(
    supervisor: Supervisor, foreign: list[shared_memory.SharedMemory]
) -> None:
    name = supervisor("child make")
    supervisor("look")
    foreign.append(shared_memory.SharedMemory(name=name))
    supervisor("end")
    assert there(name)


def test_the_next_start_removes_what_a_crashed_server_left(
    supervisor: Supervisor, foreign: list[shared_memory.SharedMemory]
) -> None:
    from gimbal.vllm_plugin.serve.shared_memory import sweep

    crashed = Supervisor()
    names = [crashed("child make"), crashed("child make")]
    crashed("look")
    (entry,) = listed(crashed)
    living = supervisor("child make")
    supervisor("look")
    foreign.append(shared_memory.SharedMemory(name=names[1]))
    crashed("kill")
    crashed.process.kill()
    crashed.process.communicate()
    assert sweep() >= 1
    assert [there(names[0]), there(names[1]), there(living), entry.exists()] == [
        False,
        True,  # somebody has it open
        True,  # its supervisor lives
        False,
    ]


def test_a_list_in_the_place_of_another_file_is_not_followed(tmp_path: Path) -> None:
    from gimbal.vllm_plugin.serve.shared_memory import sweep

    target = tmp_path / "target"
    target.write_text("")
    victim = tmp_path / "victim"
    victim.write_text("")
    target.write_text(f"{victim.stat().st_ino} victim\n")
    link = tmp_path / f"gimbal-{os.geteuid()}-x.files"
    link.symlink_to(target)
    assert sweep(tmp_path) == 0
    assert victim.exists()
    assert link.is_symlink()
    garbage = tmp_path / f"gimbal-{os.geteuid()}-y.files"
    garbage.write_text("not a list\n")
    assert sweep(tmp_path) == 0
    assert victim.exists()


def test_a_full_directory_costs_the_list_only(monkeypatch: pytest.MonkeyPatch) -> None:
    from gimbal.vllm_plugin.serve import shared_memory as ours

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ours.tempfile, "NamedTemporaryFile", full)
    shared = ours.SharedMemory(lambda: [os.getpid()])
    made = segment()
    shared.look()
    made.close()
    shared.remove()
    assert not there(made.name)
    resource_tracker.unregister("/" + made.name, "shared_memory")
