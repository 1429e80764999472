"""Which processes a server cannot do without, and which of them ended first, and how.

Both ends are here. Every process of the server notes the children that it starts with
multiprocessing, and their exit codes, in a file of the supervisor's: an exit code is told to the
parent alone. The supervisor reads that file and watches the processes themselves, because the
order in which they end is known nowhere else: one that is killed takes the others along.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import popen_fork, popen_forkserver
from pathlib import Path
from typing import Any

REPORTS = "GIMBAL_PROCESSES"
"""Environment variable: the file in which the server's processes note their children."""
ZYGOTE = "zygote"

# Names that vLLM gives its processes, what to call them, and whether the starter's name belongs
# to it. Of several that end at once, the first in this table is blamed.
_ROLES: tuple[tuple[re.Pattern[str], str, bool], ...] = (
    (re.compile(rf"{ZYGOTE}()$"), "zygote", False),
    (re.compile(r"VllmWorker-(\d+)$"), "worker rank {}", True),
    (re.compile(r"EngineCore(?:_DP(\d+))?$"), "engine {}", False),
    (re.compile(r"VLLM_DP_Coordinator()$"), "coordinator", False),
    (re.compile(r"ApiServer_(\d+)$"), "API server {}", False),
)

_HINTS = {
    "SIGBUS": " (is /dev/shm full?)",
    "SIGKILL": " (out of memory?)",
}


# In the server's processes.


def note_children() -> None:
    """Has this process note its children from now on; forks of it, and spawned copies, do too."""
    popen: Any = popen_fork.Popen
    if REPORTS not in os.environ or hasattr(popen, "gimbal_notes"):
        return
    start = popen.__init__

    def __init__(self: Any, process: Any) -> None:
        start(self, process)
        note_started(self.pid, process.name)

    popen.gimbal_notes = True
    popen.__init__ = __init__
    for cls in (popen_fork.Popen, popen_forkserver.Popen):
        cls.poll = _noting(cls.poll)  # type: ignore[method-assign]


def note_started(pid: int, name: str) -> None:
    """Notes that this process started `pid`."""
    _note(f"started {pid} {os.getpid()} {name}")


def note_ended(pid: int, code: int) -> None:
    """Notes the exit code of `pid`, minus its signal where one killed it."""
    _note(f"ended {pid} {code}")


def _noting(poll: Callable[..., int | None]) -> Callable[..., int | None]:
    def noted(self: Any, flag: int = os.WNOHANG) -> int | None:
        before = self.returncode
        code = poll(self, flag)
        if before is None and code is not None:
            note_ended(self.pid, code)
        return code

    return noted


def _note(line: str) -> None:
    """Appends one line; the server runs as well without it."""
    with contextlib.suppress(OSError, KeyError), open(os.environ[REPORTS], "a") as file:
        file.write(line + "\n")


# In the supervisor.


@dataclass(frozen=True, slots=True)
class Ended:
    """A process that is gone.

    Attributes:
        name: what it was, for people.
        pid: its process id.
        code: exit code, minus the signal that killed it, or None where nobody was told.
    """

    name: str
    pid: int
    code: int | None

    @property
    def how(self) -> str:
        if self.code is None:
            return "exit code unknown"
        if self.code >= 0:
            return f"exit code {self.code}"
        name = _signal_name(-self.code)
        return f"killed by {name}{_HINTS.get(name, '')}"

    def __str__(self) -> str:
        return f"{self.name} (process {self.pid})"


@dataclass(slots=True)
class _Member:
    role: int  # place in _ROLES; behind them all for the server's first process
    name: str
    descriptor: int | None  # of the process; None where the system gives none


class Family:
    """The processes of one server that it cannot do without.

    Args:
        server: process id of the server's first process.
        reports: file that its processes were given as `REPORTS`.
    """

    def __init__(self, server: int, reports: Path) -> None:
        self.server = server
        self._reports = reports
        self._read_bytes = 0
        self._members: dict[int, _Member] = {}
        self._codes: dict[int, int] = {}
        self._ended: list[int] = []
        self._poll = select.poll()
        self._add(server, len(_ROLES), "API server")

    def wait(self, seconds: float, wake: int) -> None:
        """Waits until a member ends or `wake` can be read, at most so long; notes who ended."""
        self._read()
        self._poll.register(wake, select.POLLIN)
        ready = {descriptor for descriptor, _ in self._poll.poll(seconds * 1e3)}
        ended = [
            pid
            for pid, member in self._members.items()
            if pid not in self._ended and _is_over(pid, member.descriptor, ready)
        ]
        for pid in sorted(ended, key=lambda pid: self._members[pid].role):
            self._ended.append(pid)
            self._note_zombie(pid)
            self._release(self._members[pid])

    def first_failure(self, server_code: int | None) -> Ended | None:
        """The first member that ended with anything but exit code 0.

        Args:
            server_code: of the server's first process; None while it runs.
        """
        self._read()
        if server_code is not None:
            self._codes[self.server] = server_code
        for pid in self._ended:
            code = self._codes.get(pid)
            if code != 0:
                return Ended(self._members[pid].name, pid, code)
        return None

    def close(self) -> None:
        for member in self._members.values():
            self._release(member)

    def _add(self, pid: int, role: int, name: str) -> None:
        descriptor = None
        with contextlib.suppress(AttributeError, OSError):
            descriptor = os.pidfd_open(pid)
            self._poll.register(descriptor, select.POLLIN)
        self._members[pid] = _Member(role, name, descriptor)

    def _release(self, member: _Member) -> None:
        if member.descriptor is not None:
            self._poll.unregister(member.descriptor)
            os.close(member.descriptor)
            member.descriptor = None

    def _read(self) -> None:
        """Takes in what the server's processes have noted since the last time."""
        try:
            with self._reports.open("rb") as file:
                file.seek(self._read_bytes)
                whole = file.read().rpartition(b"\n")[0] + b"\n"
        except OSError:
            return
        self._read_bytes += len(whole) if whole != b"\n" else 0
        for line in whole.decode(errors="replace").splitlines():
            match line.split(" ", 3):
                case ["started", pid, starter, name]:
                    self._started(int(pid), int(starter), name)
                case ["ended", pid, code]:
                    self._codes.setdefault(int(pid), int(code))

    def _started(self, pid: int, starter: int, name: str) -> None:
        for role, (pattern, text, with_starter) in enumerate(_ROLES):
            if found := pattern.match(name):
                name = text.format(found[1] or 0)
                if with_starter and starter in self._members and starter != self.server:
                    name += f" of {self._members[starter].name}"
                self._add(pid, role, name)
                return

    def _note_zombie(self, pid: int) -> None:
        """Reads the exit code of a process that nobody has collected yet."""
        state, *fields = _stat(pid)
        if state == "Z" and len(fields) > 48:
            self._codes.setdefault(pid, os.waitstatus_to_exitcode(int(fields[48])))


def _is_over(pid: int, descriptor: int | None, ready: set[int]) -> bool:
    return descriptor in ready if descriptor is not None else _stat(pid)[0] in "ZX"


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the state on; X alone when there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except FileNotFoundError:
        return ["X"] if Path("/proc/self").exists() else ["?"]
    except OSError:
        return ["?"]
    return text.rpartition(")")[2].split()


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
