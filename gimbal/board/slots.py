"""Writing and reading the rows of a `Board`: one writer per slot, any number of readers."""

from __future__ import annotations

import hashlib
import os
import time

import numpy as np
import numpy.typing as npt

from gimbal.board.file import (
    MAX_ENGINES,
    RECORD_WORDS,
    RECORDS,
    RETRIES,
    Board,
    WordArray,
    process_start,
)
from gimbal.core.contracts import FloatArray
from gimbal.core.snapshot import ROW_WIDTH

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
        self._bind()

    def _bind(self) -> None:
        self._generation = self.board.generation
        mapping = self.board.mapping
        self._newest = mapping.newest
        first = self.slot * RECORDS
        self._records = [mapping.records[first + i] for i in range(RECORDS)]
        self._rows = [record[_ROW:_CHECK] for record in self._records]
        self.number = max(self.number, int(self._newest[self.slot]))
        pid = os.getpid()
        mapping.writers[self.slot] = pid, process_start(pid)

    def publish(self, row: FloatArray, now_s: float | None = None) -> None:
        """Writes `row` [ROW_WIDTH]; looks after a deleted file at most once a second."""
        now_s = time.monotonic() if now_s is None else now_s
        if now_s >= self._next_check_s:
            self._next_check_s = now_s + 1.0
            self.board.check()
        if self._generation != self.board.generation:
            self._bind()
        words = row.view(np.uint64)
        number = self.number + 1
        index = number % RECORDS
        record = self._records[index]
        check = int(np.dot(words, _ROW_WEIGHTS)) + number * _NUMBER_WEIGHT
        record[_NUMBER] = 0
        self._rows[index][:] = words
        record[_CHECK] = check & _MASK
        record[_NUMBER] = number
        self._newest[self.slot] = number
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
        self.resize(engines)

    def resize(self, engines: int) -> None:
        """Follows an elastic server to `engines` engines."""
        if self.first + engines > MAX_ENGINES:
            raise ValueError(f"{self.first + engines} engines: a board holds {MAX_ENGINES}")
        self.engines = engines
        self._rows: FloatArray = np.zeros((engines, ROW_WIDTH))
        self._bind()

    def _bind(self) -> None:
        self._generation = self.board.generation
        mapping, last = self.board.mapping, self.first + self.engines
        self._newest = mapping.newest[self.first : last]
        self._records = mapping.records
        self._ring = np.arange(self.first, last, dtype=np.uint64) * np.uint64(RECORDS)
        self._seen = b""

    def read(self, now_s: float | None = None) -> FloatArray:
        """[engines, ROW_WIDTH] a fresh copy of every engine's newest row; zeros before its first.

        Looks after a deleted file at most four times a second.
        """
        now_s = time.monotonic() if now_s is None else now_s
        if now_s >= self._next_check_s:
            self._next_check_s = now_s + 0.25
            self.board.check()
        if self._generation != self.board.generation:
            self._bind()
        newest = self._newest.copy()
        seen = newest.tobytes()
        if seen != self._seen:
            rows, good = self._copy(newest)
            if not good.all():
                self._again(rows, newest, good)
                seen = b""
            if self.board.previous is not None:
                self._keep_previous(rows, newest)
                seen = b""
            self._rows, self._seen = rows, seen
        return self._rows.copy()

    def peek(self, column: int) -> FloatArray:
        """[engines] one column of the newest rows, unchecked: a single word cannot be torn."""
        if self._generation != self.board.generation:
            self._bind()
        index = self._ring + self._newest % RECORDS
        words: FloatArray = self._records[index, _ROW + column].view(np.float64)
        return words

    def _copy(self, newest: WordArray) -> tuple[FloatArray, npt.NDArray[np.bool_]]:
        records = self._records.take(self._ring + newest % RECORDS, axis=0)
        good = (records @ _WEIGHTS == 0) & (records[:, _NUMBER] == newest)
        return records[:, _ROW:_CHECK].view(np.float64), good

    def _again(self, rows: FloatArray, newest: WordArray, good: npt.NDArray[np.bool_]) -> None:
        """Repeats the rows that failed their check; one that keeps failing stays as it was."""
        for _ in range(RETRIES):
            bad = ~good
            self.torn += int(bad.sum())
            newest[bad] = self._newest[bad]
            again, good_again = self._copy(newest)
            rows[bad] = again[bad]
            good = ~bad | good_again
            if good.all():
                return
        rows[~good] = self._rows[~good]

    def _keep_previous(self, rows: FloatArray, newest: WordArray) -> None:
        """After the file was replaced: engines that have not noticed still write the old one."""
        old = self.board.previous
        missing = newest == 0
        if old is None or not missing.any():
            self.board.previous = None
            return
        current, self._records = self._records, old.records
        before = old.newest[self.first : self.first + self.engines].copy()
        kept, good = self._copy(before)
        self._records = current
        kept = np.where((good & (before > 0))[:, None], kept, self._rows)
        rows[missing] = kept[missing]
