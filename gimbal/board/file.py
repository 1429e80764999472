"""The signal board: a file in shared memory through which engines tell front ends their state.

One slot per engine, written by that engine alone. A slot is a ring of `RECORDS` records; a
snapshot goes into the record after the newest one, and only then is the slot's newest number
raised. A record carries its number in front and, behind the row, a checksum over row and number,
so a reader can prove that what it copied is one snapshot: on a machine that reorders stores (ARM),
when it was descheduled while the writer lapped it, or when a writer died half way. Neither side
ever waits for the other: a writer writes, a reader tries a bounded number of times and otherwise
keeps the last good row (`board_slots`). Nothing here knows of vLLM.

Layout, in 8-byte words: header, two control buffers, newest number per slot, writer process per
slot, records.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import mmap
import os
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gimbal.core.snapshot import ROW_WIDTH

WordArray = npt.NDArray[np.uint64]

MAX_ENGINES = 256
RECORDS = 4
"""Ring length of a slot: a reader is lapped only if it sleeps through three whole snapshots."""
RETRIES = 4

_MAGIC = int.from_bytes(b"GIMBALB1", "little")
_HEADER_WORDS = 16
_CONTROL_BYTES = 4096
_CONTROL_WORDS = 2 + _CONTROL_BYTES // 8
RECORD_WORDS = 72
"""Number, row and checksum, padded to a multiple of a cache line."""
_H_MAGIC, _H_WIDTH, _H_OWNER, _H_OWNER_START, _H_CONTROL = 0, 1, 2, 3, 4


def _offsets() -> tuple[int, int, int, int, int]:
    """First word of control, newest, writers and records, and the number of words."""
    control = _HEADER_WORDS
    newest = control + 2 * _CONTROL_WORDS
    writers = newest + MAX_ENGINES
    records = writers + 2 * MAX_ENGINES
    return control, newest, writers, records, records + MAX_ENGINES * RECORDS * RECORD_WORDS


_CONTROL_AT, _NEWEST_AT, _WRITERS_AT, _RECORDS_AT, _WORDS = _offsets()


def board_directory() -> Path:
    """Where boards live: shared memory where the system has it, the temporary folder elsewhere."""
    shared = Path("/dev/shm")
    return shared if shared.is_dir() and os.access(shared, os.W_OK) else Path(tempfile.gettempdir())


def board_path(identity: str, directory: Path | None = None) -> Path:
    """The board's file of the server `identity`; two identities never share one."""
    digest = hashlib.blake2b(identity.encode(), digest_size=8).hexdigest()
    return (directory or board_directory()) / f"gimbal-{os.getuid()}-{digest}.board"


def process_start(pid: int) -> int:
    """Start time of process `pid` in clock ticks since boot; 0 when there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
        state, *fields = stat.rpartition(")")[2].split()
    except (OSError, ValueError):
        return 0
    return 0 if state in "ZX" else int(fields[18])


def _alive(pid: int, start: int) -> bool:
    """Whether the very process that wrote (pid, start) still runs; pids are reused, pairs not."""
    return pid != 0 and process_start(pid) == start


class Mapping:
    """One open board file and its arrays; the mapping outlives the file's name."""

    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        info = os.fstat(self.fd)
        if info.st_size != _WORDS * 8:
            os.close(self.fd)
            raise ValueError(f"{path}: {info.st_size} bytes, a board has {_WORDS * 8}")
        self.inode = (info.st_dev, info.st_ino)
        self.words = np.frombuffer(mmap.mmap(self.fd, info.st_size), dtype=np.uint64)
        self.header = self.words[:_HEADER_WORDS]
        self.newest = self.words[_NEWEST_AT:_WRITERS_AT]
        self.writers = self.words[_WRITERS_AT:_RECORDS_AT].reshape(MAX_ENGINES, 2)
        self.records = self.words[_RECORDS_AT:].reshape(MAX_ENGINES * RECORDS, RECORD_WORDS)
        if int(self.header[_H_MAGIC]) != _MAGIC or int(self.header[_H_WIDTH]) != ROW_WIDTH:
            raise ValueError(f"{path}: not a board of this version of Gimbal")

    def __del__(self) -> None:
        with contextlib.suppress(OSError, AttributeError):
            os.close(self.fd)

    def abandoned(self) -> bool:
        """Whether its owner and every engine that wrote to it are gone."""
        owner = int(self.header[_H_OWNER]), int(self.header[_H_OWNER_START])
        pairs = [owner, *((int(p), int(s)) for p, s in self.writers if p)]
        return not any(_alive(pid, start) for pid, start in pairs)

    def owned(self) -> bool:
        """Whether this process created it (a forked child is another process)."""
        pid = os.getpid()
        return int(self.header[_H_OWNER]) == pid and int(
            self.header[_H_OWNER_START]
        ) == process_start(pid)


def _create(path: Path) -> None:
    """Puts a whole, empty board at `path` unless somebody else just did."""
    words = np.zeros(_HEADER_WORDS, dtype=np.uint64)
    pid = os.getpid()
    words[[_H_MAGIC, _H_WIDTH]] = _MAGIC, ROW_WIDTH
    words[[_H_OWNER, _H_OWNER_START]] = pid, process_start(pid)
    handle, draft = tempfile.mkstemp(prefix=".gimbal-", dir=path.parent)
    try:
        os.write(handle, words.tobytes())
        # Now, where a full /dev/shm is an error: a page that is missing later is a SIGBUS.
        os.posix_fallocate(handle, 0, _WORDS * 8)
        with contextlib.suppress(FileExistsError):
            os.link(draft, path)  # atomic: nobody ever opens a half-made board
    finally:
        os.close(handle)
        os.unlink(draft)


def sweep(directory: Path | None = None) -> list[Path]:
    """Removes this user's boards whose processes are all gone; returns what it removed."""
    removed = []
    for path in (directory or board_directory()).glob(f"gimbal-{os.getuid()}-*.board"):
        try:
            if Mapping(path).abandoned():
                path.unlink()
                removed.append(path)
        except (OSError, ValueError):
            continue
    return removed


class Board:
    """One server's board, opened or created by whoever comes first.

    Attributes:
        path: its file.
        generation: grows whenever the file had to be opened again; users rebind their arrays.
        recoveries: times the file was found missing or replaced.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.generation = 0
        self.recoveries = 0
        self.previous: Mapping | None = None
        self.mapping = self._open()

    def _open(self) -> Mapping:
        for _ in range(8):
            if not self.path.exists():
                _create(self.path)
            with contextlib.suppress(FileNotFoundError):
                mapping = Mapping(self.path)
                if not mapping.abandoned():
                    return mapping
                # Left by a server that crashed: its rows must not be taken for live ones.
                self.path.unlink(missing_ok=True)
        raise OSError(f"{self.path}: created and removed again and again by somebody else")

    def check(self) -> bool:
        """Opens or makes the file anew when it was deleted or replaced; True when it was.

        The mapping of a deleted file keeps working between processes that share it, so nothing
        is lost meanwhile; a process that opens the board later would see another one, though.
        """
        with contextlib.suppress(FileNotFoundError):
            info = os.stat(self.path)
            if (info.st_dev, info.st_ino) == self.mapping.inode:
                return False
        old = self.mapping
        self.mapping = self._open()
        self.previous = old
        self.generation += 1
        self.recoveries += 1
        if self.mapping.owned() and (control := _read_control(old)):
            self.write_control(control)
        return True

    def written_by_another(self, slot: int) -> bool:
        """Whether another living process writes `slot`."""
        pid, start = (int(word) for word in self.mapping.writers[slot])
        return pid != os.getpid() and _alive(pid, start)

    def close(self) -> None:
        """Removes the file when this process created it or nobody else uses it any more."""
        with contextlib.suppress(OSError, ValueError):
            current = Mapping(self.path)
            if current.inode == self.mapping.inode and (current.owned() or current.abandoned()):
                self.path.unlink(missing_ok=True)

    def control_version(self) -> int:
        """Number of the newest control message: one integer, read before every decision."""
        return int(self.mapping.header[_H_CONTROL])

    def read_control(self) -> dict[str, Any]:
        """The newest control message, empty when there is none."""
        return _read_control(self.mapping)

    def write_control(self, values: dict[str, Any]) -> int:
        """Publishes `values`; returns their version. Raises ValueError as `encoded_control`."""
        return self.update_control(lambda before: values)[0]

    def update_control(
        self, change: Callable[[dict[str, Any]], dict[str, Any]]
    ) -> tuple[int, dict[str, Any]]:
        """Replaces the control message by what `change` makes of it, in one step over all
        processes; returns the new version and message.

        Raises ValueError as `encoded_control`, and what `change` raises; nothing is changed then.
        """
        with _locked(self.mapping.fd):
            values = change(self.read_control())
            text = encoded_control(values)
            version = self.control_version() + 1
            words = _control_words(self.mapping, version)
            words[2:].view(np.uint8)[: len(text)] = np.frombuffer(text, dtype=np.uint8)
            words[0], words[1] = len(text), zlib.crc32(text, version & 0xFFFFFFFF)
            self.mapping.header[_H_CONTROL] = version
        return version, values


def encoded_control(values: dict[str, Any]) -> bytes:
    """A control message as it lies on the board.

    Raises ValueError when it is too long, or holds what JSON does not know.
    """
    text = json.dumps(values, sort_keys=True, allow_nan=False).encode()
    if len(text) > _CONTROL_BYTES:
        raise ValueError(f"control message of {len(text)} bytes, at most {_CONTROL_BYTES}")
    return text


@contextlib.contextmanager
def _locked(fd: int) -> Iterator[None]:
    """Keeps other control writers out; readers never look at the lock."""
    fcntl.flock(fd, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(fd, fcntl.LOCK_UN)


def _control_words(mapping: Mapping, version: int) -> WordArray:
    first = _CONTROL_AT + version % 2 * _CONTROL_WORDS
    words: WordArray = mapping.words[first : first + _CONTROL_WORDS]
    return words


def _read_control(mapping: Mapping) -> dict[str, Any]:
    for _ in range(RETRIES):
        version = int(mapping.header[_H_CONTROL])
        if version == 0:
            return {}
        words = _control_words(mapping, version)
        length, check = min(int(words[0]), _CONTROL_BYTES), int(words[1])
        text = words[2:].view(np.uint8)[:length].tobytes()
        if zlib.crc32(text, version & 0xFFFFFFFF) == check:
            values: dict[str, Any] = json.loads(text)
            return values
    return {}
