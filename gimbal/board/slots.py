"""Writing and reading the rows of a `Board`: one writer per slot, any number of readers."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time

import numpy as np
import numpy.typing as npt

from gimbal.board.file import Board
from gimbal.board.layout import (
    NEWEST_AT,
    RECORD_WORDS,
    RECORDS,
    RECORDS_AT,
    RETRIES,
    WORD,
    control_version,
)
from gimbal.board.storage import Storage
from gimbal.core.contracts import FloatArray
from gimbal.core.snapshot import MAX_ENGINES, ROW_WIDTH, check_row, words_have_foreign

WordArray = npt.NDArray[np.uint64]
BoolArray = npt.NDArray[np.bool_]

_MASK = (1 << 64) - 1
_NUMBER, _ROW, _CHECK = 0, 1, 1 + ROW_WIDTH


def _weights() -> WordArray:
    """[RECORD_WORDS] multipliers under which a whole record sums to zero modulo 2**64.

    Odd and unrelated for number and row, so that no two torn words cancel (as under an exclusive
    or, where two counters that both went from 3 to 4 would), and -1 for the checksum itself.
    """
    weights = np.zeros(RECORD_WORDS, dtype=np.uint64)
    for i in range(_CHECK):
        digest = hashlib.blake2b(b"gimbal%d" % i, digest_size=8).digest()
        weights[i] = int.from_bytes(digest, "little") | 1
    weights[_CHECK] = _MASK
    return weights


_WEIGHTS = _weights()
_NUMBER_WEIGHT = int(_WEIGHTS[_NUMBER])
_ROW_WEIGHTS = _WEIGHTS[_ROW:_CHECK].copy()
_WEIGHTS[_NUMBER] += np.uint64(1)  # a whole record sums to its number: one comparison tells both
_RING = np.uint64(RECORDS)
_SLOT_WORDS = RECORDS * RECORD_WORDS


class SlotWriter:
    """The one writer of a slot.

    Args:
        board: the server's board.
        slot: the engine's DP rank.
    """

    def __init__(self, board: Board, slot: int) -> None:
        if not 0 <= slot < MAX_ENGINES:
            raise ValueError(f"engine {slot}: a board holds {MAX_ENGINES} engines")
        self.board = board
        self.slot = slot
        self.number = 0
        self._next_check_s = 0.0
        self._record = np.zeros(RECORD_WORDS, dtype=np.uint64)
        self._words = self._record[_ROW:_CHECK]
        self._row = self._words.view(np.float64)
        self._bytes = self._record.view(np.uint8).data
        self._bind()

    def _bind(self) -> None:
        storage = self.board.storage
        self.board.claim(self.slot)
        self.number = max(self.number, WORD.unpack(storage.read(NEWEST_AT + self.slot, 1))[0])
        self._generation = self.board.generation

    def publish(self, row: FloatArray, now_s: float | None = None) -> None:
        """Writes `row` [ROW_WIDTH]; looks after the file at most once a second.

        Raises ImplausibleRow, a ValueError, for a row that is none, and OSError when the board is
        gone and cannot be made anew, or has no room: the next call tries again.
        """
        words = self._words
        self._row[:] = row
        if words_have_foreign(words):
            check_row(row)
        now_s = time.monotonic() if now_s is None else now_s
        if now_s >= self._next_check_s:
            self._next_check_s = now_s + 1.0
            self.board.check()
            self.board.claim(self.slot)  # a forked child, or one who found the slot taken
        if self._generation != self.board.generation:
            self._bind()
        number = self.number + 1
        record, storage = self._record, self.board.storage
        record[_NUMBER] = number
        record[_CHECK] = (int(words.dot(_ROW_WEIGHTS)) + number * _NUMBER_WEIGHT) & _MASK
        place = self.slot * RECORDS + number % RECORDS
        storage.write(RECORDS_AT + place * RECORD_WORDS, self._bytes)
        storage.write(NEWEST_AT + self.slot, WORD.pack(number))
        self.number = number


class BoardReader:
    """Reads the newest snapshot of `engines` slots, from slot `first` on.

    Attributes:
        torn: copies that failed their check (each was tried again).
    """

    def __init__(self, board: Board, engines: int, first: int = 0) -> None:
        self.board = board
        self.first = first
        self.torn = 0
        self._next_check_s = 0.0
        self._control_version = 0
        self.resize(engines)

    def resize(self, engines: int) -> None:
        """Follows an elastic server to `engines` engines."""
        if self.first + engines > MAX_ENGINES:
            raise ValueError(f"{self.first + engines} engines: a board holds {MAX_ENGINES}")
        self.engines = engines
        self._rows: FloatArray = np.zeros((engines, ROW_WIDTH))
        self._words = self._rows.view(np.uint64)
        self._shown = self._rows.copy()
        self._head_words = NEWEST_AT + self.first + engines
        self._head_bytes = 8 * self._head_words
        self._ring = np.arange(engines, dtype=np.uint64) * _RING
        self._records = np.zeros((engines * RECORDS, RECORD_WORDS), dtype=np.uint64)
        self._bytes = self._records.reshape(-1).view(np.uint8).data
        self._bind()

    def _bind(self) -> None:
        self._generation = self.board.generation
        self._forget()

    def _forget(self) -> None:
        """Has every row read again; it stays as it is until then."""
        self._head = self._seen = b""
        self._numbers: WordArray = np.zeros(self.engines, dtype=np.uint64)

    def read(self, now_s: float | None = None) -> FloatArray:
        """[engines, ROW_WIDTH] every engine's newest row; zeros before its first.

        The array is not written to again, and is the same one until an engine has news.
        Never raises: while the file is damaged, an engine has the row that was read last.
        """
        self.look(now_s)
        return self.rows() if self._head != self._seen else self._shown

    def look(self, now_s: float | None = None) -> int:
        """Sees how far the engines are, for `rows`; the number of the newest control message.

        Looks after the file at most four times a second. Never raises: a damaged file is as it was
        read last.
        """
        now_s = time.monotonic() if now_s is None else now_s
        if now_s >= self._next_check_s:
            self._next_check_s = now_s + 0.25
            self.board.look()
        if self._generation != self.board.generation:
            self._bind()
        storage = self.board.storage
        try:
            # In this frame, not by `Storage.head`: every request waits for it, mostly for no news.
            head = os.pread(storage.fd, self._head_bytes, 0)
            if head != self._head:
                storage.check_head(head, self._head_words)
                self._head, self._control_version = head, control_version(head)
        except OSError:
            self._forget()
        return self._control_version

    def rows(self) -> FloatArray:
        """What `read` answers, as of the last `look`."""
        if self._head != self._seen:
            try:
                self._take(self._head)
            except OSError:
                self._forget()
            self._shown = self._rows.copy()
        return self._shown

    def _take(self, head: bytes) -> None:
        """Brings the rows up to the newest records, whose numbers end `head`.

        One whose record is never whole stays as it was.
        """
        for _ in range(1 + RETRIES):
            newest = np.frombuffer(head, np.uint64, self.engines, 8 * (NEWEST_AT + self.first))
            late = (newest != self._numbers).nonzero()[0].tolist()
            torn = self._take_slots(newest, late[0], late[-1] + 1) if late else 0
            if torn == 0:
                break
            self.torn += torn
            head = self.board.storage.head(self._head_words)
        else:
            head = b""  # again at the next read
        if self.board.previous is not None:
            self._take_previous(self.board.previous, newest == 0)
            head = head if self.board.previous is None else b""
        self._seen = head

    def _take_slots(self, newest: WordArray, start: int, stop: int) -> int:
        """Brings the rows `start` to `stop` up to the records `newest`, which all others are of.

        Returns how many records were not whole.
        """
        if stop == start + 1:
            return self._take_slot(newest, start)
        wanted = newest[start:stop]
        rows, sums = self._copy(self.board.storage, wanted, start)
        numbers = wanted.tolist()
        if sums.tolist() == numbers and all(numbers):
            self._words[start:stop] = rows
            self._numbers = newest
            return 0
        good = (sums == wanted) & (wanted > 0)
        self._words[start:stop][good] = rows[good]
        self._numbers = self._numbers.copy()
        self._numbers[start:stop][good] = wanted[good]
        return int(np.count_nonzero(~good & (wanted > 0)))

    def _take_slot(self, newest: WordArray, slot: int) -> int:
        """`_take_slots` of one: a step of one engine is the common news."""
        number = newest.item(slot)
        place = (self.first + slot) * RECORDS + number % RECORDS
        data = self.board.storage.read(RECORDS_AT + place * RECORD_WORDS, RECORD_WORDS)
        record = np.frombuffer(data, np.uint64)
        if number == 0 or int(record.dot(_WEIGHTS)) != number:
            return int(number > 0)
        self._words[slot] = record[_ROW:_CHECK]
        self._numbers = newest
        return 0

    def _copy(
        self, storage: Storage, newest: WordArray, start: int = 0
    ) -> tuple[WordArray, WordArray]:
        """The rows in the records `newest`, of slots from `start` on, and the records' sums."""
        slots = len(newest)
        first = RECORDS_AT + (self.first + start) * _SLOT_WORDS
        storage.read_into(self._bytes[: 8 * _SLOT_WORDS * slots], first)
        records = self._records.take(self._ring[:slots] + newest % _RING, 0)
        return records[:, _ROW:_CHECK], records.dot(_WEIGHTS)

    def _take_previous(self, old: Storage, missing: BoolArray) -> None:
        """After the file was replaced, engines that have not noticed still write the `old` one."""
        if not missing.any():
            self.board.previous = None
            return
        with contextlib.suppress(OSError):  # cut short: nothing of it is left
            # Without the header, which may be gone: the records say themselves whether they hold.
            newest = np.frombuffer(old.read(NEWEST_AT + self.first, self.engines), np.uint64)
            rows, sums = self._copy(old, newest)
            good = missing & (sums == newest) & (newest > 0)
            self._words[good] = rows[good]
