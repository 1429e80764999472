"""Locks on single bytes of a board file, which the kernel drops when their holder is gone.

They belong to an open file description (``F_OFD_SETLK``), not to a process id: they mean the same
in every PID namespace, a killed process keeps none, and closing another descriptor of the same file
drops none. A forked child shares its parent's descriptions; `Storage` therefore gives it its own.
"""

from __future__ import annotations

import errno
import fcntl
import struct

LIFE = 0
"""Shared: whoever uses the board holds it."""
CHANGE = 1
"""Exclusive: held while a control message is changed, or the file is joined or removed."""
_WRITER = 2

_FLOCK = struct.Struct("hhqqi4x")  # struct flock: type, whence, start, length, process id


def writer(slot: int) -> int:
    """The byte that the writer of `slot` holds, exclusively."""
    return _WRITER + slot


def take(fd: int, byte: int, shared: bool = False) -> bool:
    """Locks `byte` for the file description of `fd`; False when another one holds it."""
    kind = fcntl.F_RDLCK if shared else fcntl.F_WRLCK
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, 0, byte, 1, 0))
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True


def release(fd: int, byte: int, count: int = 1) -> None:
    """Unlocks `count` bytes from `byte` on; those that are not locked stay so."""
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_UNLCK, 0, byte, count, 0))


def held_by_another(fd: int, byte: int) -> bool:
    """Whether a file description other than that of `fd` holds `byte`, shared or not."""
    asked = _FLOCK.pack(fcntl.F_WRLCK, 0, byte, 1, 0)
    kind: int = _FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_OFD_GETLK, asked))[0]
    return kind != fcntl.F_UNLCK
