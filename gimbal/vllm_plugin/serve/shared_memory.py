"""The files in /dev/shm that one server made, told from those it merely uses.

Linux does not keep who made a file, so the supervisor looks twice a second. A file is the server's
when it was not there before the start, belongs to this user, and, the first time it is seen, is
mapped or held open by a process of the server and by no other process of this user. Any doubt is
settled against it: a file of another program is never removed while that program lives and holds
it, nor is any file that was there before. Two cases are decided wrongly. A file that another
program makes and lets go of, and that the server takes up within the half second between two
looks, counts as the server's. A file that the server makes and lets go of in that time counts as
another's; what Python's multiprocessing makes is then removed by its resource tracker
(`processes.end_all` waits for it).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import tempfile
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import IO

DIRECTORY = Path("/dev/shm")
# A line of /proc/PID/maps: addresses, permissions, offset, device, inode, path.
_MAPPED = re.compile(r"([0-9a-f]+):([0-9a-f]+) (\d+)\s+/dev/shm/.*$", re.MULTILINE)
_PREFIX, _SUFFIX = f"gimbal-{os.geteuid()}-", ".files"
Inode = tuple[int, int]  # device, inode
Entry = tuple[str, int]  # name, inode


class SharedMemory:
    """Files below /dev/shm that the server made.

    They are listed in a file there as well, by which `sweep` finds those of a server that was
    killed together with its supervisor.

    Args:
        family: process ids of the server, asked for when a new file is seen.
        directory: a folder with the files; other than /dev/shm in tests.
    """

    def __init__(self, family: Callable[[], list[int]], directory: Path = DIRECTORY) -> None:
        self._family = family
        self._directory = directory
        self._foreign = _entries(directory)
        self._ours: set[Entry] = set()
        self._list = ServerList(directory)

    def look(self) -> None:
        """Decides about the files that are new since the last look."""
        present = _entries(self._directory)
        new = present - self._foreign - self._ours
        self._foreign &= present
        if not new and self._ours <= present:
            return
        self._ours &= present
        if new:
            family = self._family()
            made = self._held(new, family)
            made -= self._held(made, _others(family)) if made else set()
            self._ours |= made
            self._foreign |= new - made
        self._list.write(self._ours)

    def remove(self) -> None:
        """Removes what the server made and nobody else uses; its processes have to be gone."""
        _remove(self._directory, self._ours)
        self._ours = set()
        self._list.close()

    def _held(self, entries: Iterable[Entry], pids: Iterable[int]) -> set[Entry]:
        """Those of `entries` that belong to this user and that one of `pids` maps or has open."""
        held = inodes_held(pids)
        found = set()
        for name, inode in entries:
            with contextlib.suppress(OSError):
                info = (self._directory / name).lstat()
                mine = info.st_uid == os.geteuid() and info.st_ino == inode
                if mine and (info.st_dev, inode) in held:
                    found.add((name, inode))
        return found


class ServerList:
    """A file in `directory` that lists what a server made; locked while its supervisor lives."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._file: IO[str] | None = None

    def write(self, entries: Iterable[Entry]) -> None:
        """Writes `entries`, one a line. A full /dev/shm costs the list, not the server."""
        with contextlib.suppress(OSError):
            if self._file is None:
                self._file = tempfile.NamedTemporaryFile(  # noqa: SIM115
                    "w", prefix=_PREFIX, suffix=_SUFFIX, dir=self._directory, buffering=1
                )
                fcntl.flock(self._file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._file.truncate(0)
            self._file.seek(0)
            self._file.writelines(f"{inode} {name}\n" for name, inode in sorted(entries))

    def close(self) -> None:
        """Removes the list."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None


def sweep(directory: Path = DIRECTORY) -> int:
    """Removes what this user's crashed servers left and nobody holds; returns how many files."""
    removed = 0
    for path in directory.glob(f"{_PREFIX}*{_SUFFIX}"):
        with contextlib.suppress(OSError, ValueError):
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            with open(descriptor, encoding="utf-8") as file:
                if os.fstat(descriptor).st_uid != os.geteuid():
                    continue
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails: still supervised
                rows = [line.rstrip("\n").split(" ", 1) for line in file]
                removed += _remove(directory, {(name, int(inode)) for inode, name in rows})
                path.unlink()
    return removed


def shared_memory_of(pids: Collection[int]) -> set[Path]:
    """Files below /dev/shm that `pids` map or hold open.

    Compared by inode: a POSIX semaphore is mapped under the name it had before it got its own.
    """
    held = inodes_held(pids)
    found = set()
    for name, inode in _entries(DIRECTORY):
        with contextlib.suppress(OSError):
            if (os.lstat(DIRECTORY / name).st_dev, inode) in held:
                found.add(DIRECTORY / name)
    return found


def inodes_held(pids: Iterable[int]) -> set[Inode]:
    """Inodes below /dev/shm that `pids` map or hold open, as far as this user may see them."""
    inodes: set[Inode] = set()
    for pid in pids:
        process = Path("/proc") / str(pid)
        with contextlib.suppress(OSError):
            for major, minor, inode in _MAPPED.findall((process / "maps").read_text()):
                inodes.add((os.makedev(int(major, 16), int(minor, 16)), int(inode)))
        with contextlib.suppress(OSError):
            for descriptor in (process / "fd").iterdir():
                with contextlib.suppress(OSError):
                    if os.readlink(descriptor).startswith("/dev/shm/"):
                        info = descriptor.stat()
                        inodes.add((info.st_dev, info.st_ino))
    return inodes


def _entries(directory: Path) -> set[Entry]:
    """(name, inode) of everything in `directory`; empty where there is none."""
    try:
        with os.scandir(directory) as found:
            return {(entry.name, entry.inode()) for entry in found}
    except OSError:
        return set()


def _others(family: Collection[int]) -> list[int]:
    """Processes of this user outside `family`: whoever made a file of this user's is among them."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        pid = int(folder.name)
        with contextlib.suppress(OSError):
            if pid not in family and folder.stat().st_uid == os.geteuid():
                found.append(pid)
    return found


def _remove(directory: Path, entries: set[Entry]) -> int:
    """Unlinks those of `entries` that are still there and held by no process; returns how many."""
    removed = 0
    left = _entries(directory) & entries
    held = inodes_held(_others(())) if left else set()
    for name, inode in left:
        path = directory / name
        with contextlib.suppress(OSError):
            info = path.lstat()
            if info.st_ino == inode and (info.st_dev, inode) not in held:
                path.unlink()
                removed += 1
    return removed
