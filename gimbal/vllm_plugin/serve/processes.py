"""Finds and ends every process of one server."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

TRACKER_GRACE_S = 5.0
"""How long multiprocessing's resource tracker gets to remove what dead processes left."""


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


def resident_bytes(pids: list[int]) -> int:
    """Resident memory of `pids` together; pages they share count once per process."""
    import psutil

    total = 0
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            total += psutil.Process(pid).memory_info().rss
    return total


def tcp_connections(pids: Sequence[int]) -> list[Any] | None:
    """TCP connections of `pids`, as psutil has them; None where they cannot be seen."""
    import psutil

    found: list[Any] = []
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            try:
                found += psutil.Process(pid).net_connections("tcp")
            except psutil.AccessDenied:
                return None
    return found


def listens(pids: list[int], port: int) -> bool:
    """Whether one of `pids` listens on TCP `port`; True where that cannot be seen."""
    import psutil

    found = tcp_connections(pids)
    if found is None:
        return True
    return any(c.status == psutil.CONN_LISTEN and c.laddr.port == port for c in found)


def end_all(first: int, grace_s: float, look: Callable[[], None] = lambda: None) -> None:
    """Ends process `first` and every descendant of this process.

    `first` gets SIGTERM and `grace_s` seconds to take its own children down; whatever still
    lives then is killed. Returns when no descendant is left. `look` is called while they live.
    """
    look()
    _signal(first, signal.SIGTERM)
    deadline_s = time.monotonic() + grace_s
    while (alive := _ending()) and time.monotonic() < deadline_s:
        look()
        # Once the server itself is gone nobody else will end its orphans.
        if first not in alive:
            for pid in alive:
                _signal(pid, signal.SIGTERM)
            deadline_s = min(deadline_s, time.monotonic() + 3.0)
        time.sleep(0.1)
    while alive := _ending():
        for pid in alive:
            _signal(pid, signal.SIGSTOP)  # so that none makes another file behind our back
        look()
        for pid in alive:
            _signal(pid, signal.SIGKILL)
        time.sleep(0.05)
    _wait_for_trackers()
    reap()


def _ending() -> list[int]:
    """All descendants but resource trackers: those end by themselves, after all others."""
    return [pid for pid in descendants() if not _is_tracker(pid)]


def _is_tracker(pid: int) -> bool:
    try:
        return b"multiprocessing.resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def _wait_for_trackers() -> None:
    """A tracker removes what its dead processes left; it notices when the last one is gone."""
    deadline_s = time.monotonic() + TRACKER_GRACE_S
    while trackers := descendants():
        if time.monotonic() > deadline_s:
            for pid in trackers:
                _signal(pid, signal.SIGKILL)
        time.sleep(0.05)


def reap() -> None:
    """Collects exited children, adopted ones included, so that no zombie stays."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0] != 0:
            continue


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)
