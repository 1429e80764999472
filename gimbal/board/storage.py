"""One open board file: who may open it, and reads and writes that nothing outside can turn fatal.

Words are read with ``pread`` and written with ``pwrite``; the file is never mapped. A mapping would
be faster: by 2 us per snapshot, and per read by 0.5 us where one engine has news, 2 where all of 8
have and 10 of 64 (a decision may take 15 and 60). But whoever truncates a mapped file kills every
process that touches the lost pages, by SIGBUS, and a check of its size before each access only
narrows the gap. A read of a file that was cut short returns less, and a write to it extends it or
is an OSError. Seals, which forbid to truncate, exist for anonymous files only, and those have no
name to find them by. Neither way copies a record in one piece; its checksum tells.

A board is a plain file of mode 0600 that belongs to this user. Anything else under its name is
refused, symbolic links without being followed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import tempfile
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gimbal.board import locks
from gimbal.board.layout import (
    BOARD_BYTES,
    EMPTY_HEADER,
    Nature,
    control_version,
    is_header,
    nature,
)
from gimbal.core.snapshot import MAX_ENGINES

PATIENCE_S, FIRST_PATIENCE_S = 0.1, 5.0
"""How long a change waits for another one: an event loop may be what waits. The second where a
process opens its board: without one it would be silent for life."""
_HEADER_BYTES = len(EMPTY_HEADER)
_OPEN_FLAGS = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


class Storage:
    """An open board file and this process's locks on it; it outlives the file's name.

    Args:
        path: its name, for messages.
        fd: its descriptor, closed with this object.
    """

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self.fd = fd
        info = os.fstat(fd)
        self.inode = (info.st_dev, info.st_ino)
        self._mutex = threading.Lock()
        self._header, self._version = b"", 0  # as read last
        _OPEN.add(self)

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Closes the descriptor, and with it drops this process's locks."""
        fd, self.fd = getattr(self, "fd", -1), -1
        if fd >= 0:
            with contextlib.suppress(OSError):
                os.close(fd)

    # Reading and writing.

    def read(self, first: int, words: int) -> bytes:
        """`words` words from `first` on. Raises OSError when the file has become shorter."""
        data = os.pread(self.fd, 8 * words, 8 * first)
        if len(data) != 8 * words:
            raise OSError(errno.EIO, "the board was cut short", str(self.path))
        return data

    def read_into(self, buffer: Any, first: int) -> None:
        """Fills `buffer`, a memoryview of bytes, with the words from `first` on. As `read`."""
        if os.preadv(self.fd, [buffer], 8 * first) != len(buffer):
            raise OSError(errno.EIO, "the board was cut short", str(self.path))

    def write(self, first: int, data: Any) -> None:
        """Writes bytes at word `first`. Raises OSError when there is no room for all of them."""
        if os.pwrite(self.fd, data, 8 * first) != len(data):
            raise OSError(errno.ENOSPC, "no room for what the board lost", str(self.path))

    def head(self, words: int) -> bytes:
        """The first `words` words. Raises OSError when this is no board any more."""
        data = os.pread(self.fd, 8 * words, 0)
        self.check_head(data, words)
        return data

    def check_head(self, data: bytes, words: int) -> None:
        """Raises OSError when `data` are not the first `words` words of a board."""
        if len(data) != 8 * words or not is_header(data):
            raise OSError(errno.EIO, "the board's header is gone", str(self.path))

    def control_version(self) -> int:
        """Number of the newest control message. Raises OSError when this is no board any more.

        Asked before every step and every decision: a header that has not changed is not parsed.
        """
        data = os.pread(self.fd, _HEADER_BYTES, 0)
        if data != self._header:
            self.check_head(data, _HEADER_BYTES // 8)
            self._header, self._version = data, control_version(data)
        return self._version

    @property
    def nature(self) -> Nature:
        return nature(os.pread(self.fd, len(EMPTY_HEADER), 0))

    def fault(self) -> str | None:
        """Why this is not a whole board of this version, or None."""
        size, kind = os.fstat(self.fd).st_size, self.nature
        if kind is Nature.BOARD and size == BOARD_BYTES:
            return None
        if kind is Nature.BOARD:
            kind = Nature.REMAINS
        return f"{kind.value} ({size} bytes; one of this version has {BOARD_BYTES})"

    # Names and locks.

    def named(self, path: Path) -> bool:
        """Whether `path` is this file's name."""
        try:
            info = os.lstat(path)
        except FileNotFoundError:
            return False
        return (info.st_dev, info.st_ino) == self.inode

    def join(self) -> None:
        """Says that this process uses the board, for as long as it lives or keeps it open."""
        if not locks.take(self.fd, locks.LIFE, shared=True):
            raise OSError(errno.EBUSY, "the board is locked by another program", str(self.path))

    def leave(self) -> None:
        """Takes back `join`, and gives up this process's slots."""
        locks.release(self.fd, locks.LIFE)
        locks.release(self.fd, locks.writer(0), MAX_ENGINES)

    def used_by_others(self) -> bool:
        """Whether anybody has joined through another descriptor, in this process or elsewhere."""
        return locks.held_by_another(self.fd, locks.LIFE)

    @contextlib.contextmanager
    def changing(self, patience_s: float = PATIENCE_S) -> Iterator[None]:
        """Keeps other changes out; readers never look at the lock.

        Raises TimeoutError, an OSError, after `patience_s`: its holder may be frozen.
        """
        deadline = time.monotonic() + patience_s
        if not self._mutex.acquire(timeout=patience_s):
            raise TimeoutError(errno.ETIMEDOUT, "another change does not end", str(self.path))
        try:
            while not locks.take(self.fd, locks.CHANGE):
                if time.monotonic() > deadline:
                    raise TimeoutError(
                        errno.ETIMEDOUT, "another process keeps the board locked", str(self.path)
                    )
                time.sleep(0.001)
            try:
                yield
            finally:
                locks.release(self.fd, locks.CHANGE)
        finally:
            self._mutex.release()

    def part_from_parent(self) -> None:
        """In a forked child: a description of its own, without its parent's locks."""
        self._mutex = threading.Lock()
        if self.fd < 0:
            return
        try:
            own = os.open(f"/proc/self/fd/{self.fd}", os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            self.close()  # what it reads is an OSError from now on
            return
        os.dup2(own, self.fd, inheritable=False)
        os.close(own)


_OPEN: weakref.WeakSet[Storage] = weakref.WeakSet()


def _part_all() -> None:
    for storage in list(_OPEN):
        storage.part_from_parent()


os.register_at_fork(after_in_child=_part_all)


def opened(path: Path) -> Storage:
    """The file at `path`, whatever it holds.

    Raises FileNotFoundError when there is none, and OSError for a symbolic link, anything but a
    plain file, and a file that others own or may open.
    """
    try:
        fd = os.open(path, _OPEN_FLAGS)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(error.errno, "a symbolic link instead of a board", str(path)) from None
        raise
    info = os.fstat(fd)
    fault = None
    if not stat.S_ISREG(info.st_mode):
        fault = "not a plain file"
    elif info.st_uid != os.geteuid():
        fault = f"belongs to user {info.st_uid}, not to user {os.geteuid()}"
    elif info.st_mode & 0o077:
        fault = f"open to others (mode {stat.S_IMODE(info.st_mode):04o}, a board has 0600)"
    if fault is not None:
        os.close(fd)
        raise OSError(errno.EPERM, fault, str(path))
    return Storage(path, fd)


def created(path: Path) -> Storage | None:
    """A whole, empty board at `path`, joined; None when somebody else just made one.

    Raises OSError when there is no room for it: its space is reserved now.
    """
    prefix = f".gimbal-{os.getuid()}-"
    try:
        fd, draft = tempfile.mkstemp(prefix=prefix, suffix=".draft", dir=path.parent)
    except OSError as error:
        raise _no_board(path, error) from error
    storage = Storage(path, fd)
    try:
        os.posix_fallocate(fd, 0, BOARD_BYTES)
        storage.write(0, EMPTY_HEADER)
        storage.join()  # before it has its name: nobody ever takes it for an abandoned one
        os.link(draft, path)  # atomic: nobody ever opens a half-made board
    except (FileExistsError, FileNotFoundError):  # the second: somebody swept the draft
        return None
    except OSError as error:
        raise _no_board(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            os.unlink(draft)
    return storage


def _no_board(path: Path, error: OSError) -> OSError:
    said = f"no board of {BOARD_BYTES >> 10} KiB can be made: {error.strerror}"
    return OSError(error.errno, said, str(path))


def in_the_way(path: Path) -> bool:
    """Whether this user's file or link at `path` is one that `opened` refuses."""
    info = os.lstat(path)
    refused = not stat.S_ISREG(info.st_mode) or info.st_mode & 0o077
    return bool(refused) and not stat.S_ISDIR(info.st_mode) and info.st_uid == os.geteuid()
