"""Finds and ends every process of one server, and the shared memory they would leave."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import sys
import time
from pathlib import Path

_SHARED_MEMORY = Path("/dev/shm")
# A line of /proc/PID/maps: addresses, permissions, offset, device, inode, path.
_MAPPED = re.compile(r"(\d+)\s+/dev/shm/.*$", re.MULTILINE)


def adopt_orphans() -> None:
    """Makes this process the parent of descendants whose own parent dies (Linux).

    Engine and worker processes of a killed API server stay findable that way.
    """
    if sys.platform.startswith("linux"):
        pr_set_child_subreaper = 36
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_child_subreaper, 1)


def descendants() -> list[int]:
    """Process ids of all live descendants of this process, zombies left out."""
    return descendants_of(os.getpid())


def descendants_of(pid: int) -> list[int]:
    """Process ids of all live descendants of `pid`, zombies left out."""
    import psutil

    found = []
    try:
        children = psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            if child.status() != psutil.STATUS_ZOMBIE:
                found.append(child.pid)
    return found


def shared_memory_of(pids: list[int]) -> set[Path]:
    """Files below /dev/shm that `pids` map or hold open.

    Compared by inode: a POSIX semaphore is mapped under the name it had before it got its own.
    """
    inodes: set[int] = set()
    for pid in pids:
        process = Path("/proc") / str(pid)
        with contextlib.suppress(OSError):
            inodes |= {int(found) for found in _MAPPED.findall((process / "maps").read_text())}
        with contextlib.suppress(OSError):
            for descriptor in (process / "fd").iterdir():
                with contextlib.suppress(OSError):
                    if os.readlink(descriptor).startswith("/dev/shm/"):
                        inodes.add(descriptor.stat().st_ino)
    found = set()
    with contextlib.suppress(OSError):
        for path in _SHARED_MEMORY.iterdir():
            with contextlib.suppress(OSError):
                if path.stat().st_ino in inodes:
                    found.add(path)
    return found


def resident_bytes(pids: list[int]) -> int:
    """Resident memory of `pids` together; pages they share count once per process."""
    import psutil

    total = 0
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            total += psutil.Process(pid).memory_info().rss
    return total


def end_all(first: int, grace_s: float) -> None:
    """Ends process `first` and every descendant of this process, and unlinks what they leave.

    `first` gets SIGTERM and `grace_s` seconds to take its own children down; whatever still
    lives then is killed. Returns when no descendant is left.
    """
    leftovers = shared_memory_of(descendants())
    _signal(first, signal.SIGTERM)
    deadline_s = time.monotonic() + grace_s
    while (alive := descendants()) and time.monotonic() < deadline_s:
        leftovers |= shared_memory_of(alive)
        # Once the server itself is gone nobody else will end its orphans.
        if first not in alive:
            for pid in alive:
                _signal(pid, signal.SIGTERM)
            deadline_s = min(deadline_s, time.monotonic() + 3.0)
        time.sleep(0.1)
    while alive := descendants():
        for pid in alive:
            _signal(pid, signal.SIGSTOP)  # so that none makes another file behind our back
        leftovers |= shared_memory_of(alive)
        for pid in alive:
            _signal(pid, signal.SIGKILL)
        time.sleep(0.05)
    reap()
    for path in leftovers:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()


def reap() -> None:
    """Collects exited children, adopted ones included, so that no zombie stays."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0] != 0:
            continue


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)
