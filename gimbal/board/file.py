"""The signal board: a file in shared memory through which engines tell front ends their state.

One slot per engine, written by that engine alone. A slot is a ring of `RECORDS` records; a
snapshot goes into the record after the newest one, and only then is the slot's newest number
raised. A record carries its number in front and, behind the row, a checksum over row and number,
so a reader can prove that what it copied is one snapshot: on a machine that reorders stores (ARM),
when it was descheduled while the writer lapped it, or when a writer died half way. Neither side
ever waits for the other: a writer writes, a reader tries a bounded number of times and otherwise
keeps the last good row (`slots`). Nothing here knows of vLLM.

The file may be deleted, replaced or cut short while it is in use (`storage` says why that ends no
process): whoever notices first makes it anew, the others follow, and an operator's last control
message goes along. Who uses a board holds a lock on it that the kernel drops with the process
(`locks`), so that the board of a server that is gone is known in every PID namespace.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gimbal.board import locks
from gimbal.board.control import decoded_control, encoded_control, read_control, write_control
from gimbal.board.layout import HELD_AT, WORD, Nature
from gimbal.board.storage import (
    FIRST_PATIENCE_S,
    PATIENCE_S,
    Storage,
    created,
    in_the_way,
    opened,
)
from gimbal.core.errors import one_line

logger = logging.getLogger("vllm.gimbal")

_ATTEMPTS = 8
_LOOK_S = 1.0
_SHARED_MEMORY = Path("/dev/shm")
BESIDE = ".front-"
"""After a board's name: a file that lies beside it and goes with it."""
_MADE_HERE: set[Path] = set()
"""Where this process made a board; a forked child is another process."""
os.register_at_fork(after_in_child=_MADE_HERE.clear)


def board_directory() -> Path:
    """Where boards live: shared memory where the system has it, the temporary folder elsewhere."""
    usable = _SHARED_MEMORY.is_dir() and os.access(_SHARED_MEMORY, os.W_OK)
    return _SHARED_MEMORY if usable else Path(tempfile.gettempdir())


def board_path(identity: str, directory: Path | None = None) -> Path:
    """The board's file of the server `identity`; two identities or users never share one."""
    digest = hashlib.blake2b(identity.encode(), digest_size=8).hexdigest()
    return (directory or board_directory()) / f"gimbal-{os.getuid()}-{digest}.board"


def fallback_path(path: Path) -> Path | None:
    """Where the board goes when shared memory is full; None when `path` is not there."""
    return Path(tempfile.gettempdir()) / path.name if path.parent == _SHARED_MEMORY else None


def sweep(directory: Path | None = None) -> list[Path]:
    """Removes this user's boards, and drafts of them, that no process uses; returns which. What
    lies beside a board that is gone goes too."""
    folders = [directory] if directory else [board_directory(), Path(tempfile.gettempdir())]
    mine = f"gimbal-{os.getuid()}-"
    removed = []
    for folder in dict.fromkeys(folders):
        for path in [*folder.glob(f"{mine}*.board"), *folder.glob(f".{mine}*.draft")]:
            try:
                storage = opened(path)
                with storage.changing():
                    # What another version made is that version's to judge.
                    ours = storage.nature in (Nature.BOARD, Nature.REMAINS)
                    strange = path.suffix == ".board" and not ours
                    if strange or storage.used_by_others() or not storage.named(path):
                        continue
                    path.unlink()
                removed.append(path)
            except OSError:
                continue
        for path in folder.glob(f"{mine}*.board{BESIDE}*"):
            if not path.with_name(path.name.partition(BESIDE)[0]).exists():
                _unlinked(path)
    return removed


def _unlinked(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


class Board:
    """One server's board, opened or created by whoever comes first.

    Args:
        path: its file.
        fallback: its file where there is no room at `path`; the default is `fallback_path`.
        common: servers use it that come and go by themselves, so whoever made it leaves it to them.

    Attributes:
        path: where it is now, one of the two.
        generation: grows whenever the file had to be opened again; users read their slots anew.
        recoveries: times the file was found missing, replaced or cut short.
        problem: why the file cannot be made anew at present, on one line; None when all is well.
        failures: attempts to make it anew that failed.

    Raises OSError when there is no board to be had; the message says why.
    """

    def __init__(self, path: Path, fallback: Path | None = None, common: bool = False) -> None:
        self.path = self._primary = path
        self._fallback = fallback or fallback_path(path)
        self._common = common
        self.generation = 0
        self.recoveries = 0
        self.failures = 0
        self.problem: str | None = None
        self.previous: Storage | None = None
        self._control: tuple[int, bytes] = (0, b"")
        self._next_look_s = 0.0
        self._said: set[str] = set()
        self.storage = self._open(known=False)

    def for_another_thread(self) -> Board:
        """The same board opened once more: one object belongs to one thread."""
        return Board(self._primary, self._fallback, self._common)

    # The file.

    @property
    def _places(self) -> list[Path]:
        return [place for place in (self._primary, self._fallback) if place is not None]

    def _open(self, known: bool) -> Storage:
        for _ in range(_ATTEMPTS):
            for place in self._places:
                storage = _joined(place, known)
                if storage is not None:
                    self.path = place
                    return storage
            storage = self._create()
            if storage is not None:
                if not self._common:
                    _MADE_HERE.add(self.path)
                return storage
        raise OSError(errno.EAGAIN, "made and removed again and again by others", str(self.path))

    def _create(self) -> Storage | None:
        """The board made at the first place with room; None when somebody else was faster."""
        try:
            self.path = self._primary
            return created(self._primary)
        except OSError as error:
            if self._fallback is None:
                raise
            try:
                storage = created(self._fallback)
            except OSError as second:
                raise OSError(error.errno, f"{one_line(error)}; {one_line(second)}") from second
            self.path = self._fallback
            logger.warning("Gimbal: %s; the board is at %s", one_line(error), self._fallback)
            return storage

    def check(self) -> bool:
        """Opens or makes the file anew when it was deleted, replaced or cut short; True when it
        was. Raises OSError when that is not possible; the old file is kept then.

        A deleted file keeps working between processes that have it open, so nothing is lost
        meanwhile; a process that opens the board later would see another one, though.
        """
        if self._sound():
            self._remember_control()
            return False
        old = self.storage
        self.storage = self._open(known=True)
        self.previous = old
        self.generation += 1
        self.recoveries += 1
        self._restore_control()
        return True

    def _sound(self) -> bool:
        """Whether the name still leads to the file that is open, and that is whole."""
        moved = self.path != self._primary and os.path.lexists(self._primary)
        try:
            return not moved and self.storage.named(self.path) and self.storage.fault() is None
        except OSError:
            return False

    def look(self) -> None:
        """`check` that never raises: what fails is counted and said once, and tried again later."""
        try:
            self.check()
        except (OSError, ValueError) as error:
            self.failures += 1
            self.problem = one_line(error)
            if self.problem not in self._said and len(self._said) < _ATTEMPTS:
                self._said.add(self.problem)
                logger.warning("Gimbal: the board is kept as it was: %s", self.problem)
        else:
            self.problem = None

    def close(self) -> None:
        """Removes the file when this process created it or nobody else uses it any more."""
        try:
            self.storage.leave()
        except OSError:
            return
        for place in self._places:
            try:
                current = opened(place)
                with current.changing():
                    last = place in _MADE_HERE or not current.used_by_others()
                    if last and current.fault() is None and current.named(place):
                        place.unlink()
                        for path in place.parent.glob(f"{place.name}{BESIDE}*"):
                            _unlinked(path)
            except OSError:
                continue

    # Slots.

    def written_by_another(self, slot: int) -> bool:
        """Whether another process, or another `Board` of this one, writes `slot`."""
        return locks.held_by_another(self.storage.fd, locks.writer(slot))

    def claim(self, slot: int) -> None:
        """Says that this process writes `slot`. A second writer is not kept out: the first may be
        an engine that was replaced and takes long to end."""
        self.storage.join()
        locks.take(self.storage.fd, locks.writer(slot))

    # Control messages.

    def control_version(self) -> int:
        """Number of the newest control message: one read, made before every decision.

        Never raises: a damaged board has the version that was read last. Looks after the file
        once a second.
        """
        now_s = time.monotonic()
        if now_s >= self._next_look_s:
            self._next_look_s = now_s + _LOOK_S
            self.look()
        try:
            return self.storage.control_version()
        except OSError:
            return self._control[0]

    def read_control(self) -> dict[str, Any]:
        """The newest control message, empty when there is none or it cannot be trusted.

        Never raises: a damaged board has the message that was read last.
        """
        with contextlib.suppress(OSError):
            self._remember_control()
        return decoded_control(self._control[1])

    def update_control(
        self, change: Callable[[dict[str, Any]], dict[str, Any]]
    ) -> tuple[int, dict[str, Any]]:
        """Replaces the control message by what `change` makes of it, in one step over all
        processes; returns the new version and message.

        Waits `PATIENCE_S` at most for another change. Raises OSError when the board cannot be
        written, ValueError as `encoded_control`, and what `change` raises; nothing is changed then.
        """
        for _ in range(_ATTEMPTS):
            self.check()
            with self.storage.changing():
                if not self.storage.named(self.path):
                    continue  # replaced since: nobody would see it
                version, text = read_control(self.storage)
                values = change(decoded_control(text))
                text = encoded_control(values)
                write_control(self.storage, version + 1, text)
                self._control = version + 1, text
                return version + 1, values
        raise OSError(errno.EAGAIN, "replaced again and again by others", str(self.path))

    def write_control(self, values: dict[str, Any]) -> int:
        """Publishes `values` whatever was there; returns their version. Raises as the above."""
        return self.update_control(lambda before: values)[0]

    def hold(self, slot: int, version: int) -> None:
        """Notes that the engine of `slot` holds control message `version`, and follows it from its
        next step on. Raises OSError when the board cannot be written."""
        self.storage.write(HELD_AT + slot, WORD.pack(version))

    def held(self, first: int, engines: int) -> list[int]:
        """What `engines` engines from `first` on hold; nothing, 0, while the board is damaged."""
        try:
            words = self.storage.read(HELD_AT + first, engines)
        except OSError:
            return [0] * engines
        return [version for (version,) in WORD.iter_unpack(words)]

    def _remember_control(self) -> None:
        """Takes the newest message in; a board that has none was made anew, and gets the last."""
        version = self.storage.control_version()
        if version == 0:
            self._restore_control()
        elif version != self._control[0]:
            self._control = read_control(self.storage)

    def _restore_control(self) -> None:
        """Puts the message that was read last on a board that has none."""
        version, text = self._control
        if version == 0:
            return
        with self.storage.changing():
            if self.storage.control_version() == 0:
                write_control(self.storage, version, text)


def _joined(path: Path, known: bool) -> Storage | None:
    """The live board at `path`; None when there is none, or no longer: what a server left behind
    that is gone is removed, since its rows must not be taken for live ones.

    Args:
        known: this process had a board there, so what is no board may be replaced.
    """
    try:
        storage = opened(path)
    except FileNotFoundError:
        return None
    except OSError:
        if known and in_the_way(path):
            path.unlink()
            return None
        raise
    with storage.changing(PATIENCE_S if known else FIRST_PATIENCE_S):
        live, fault = storage.used_by_others(), storage.fault()
        if live and fault is None:
            storage.join()
            return storage
        # Cut short, or left behind: to be made anew. What else lies under this name is removed
        # only where there was a board, and never a board of another version.
        kind = storage.nature
        foreign = kind is Nature.FOREIGN and not (known or live)
        if foreign or kind is Nature.OTHER_VERSION:
            raise OSError(errno.EINVAL, f"there lies {fault}", str(path))
        if storage.named(path):
            path.unlink()
    return None
