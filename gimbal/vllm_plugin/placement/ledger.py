"""One `RebalanceRecord` per rearrangement, what was predicted beside what came of it.

What came of it is known at the next rearrangement: the counts that followed price the map that
was replaced and the one that replaced it. Only then is the record complete; until then its line
stands with the realized fields empty and is rewritten in place when they are known.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, replace
from os import SEEK_END
from pathlib import Path

from gimbal.records.schema import RebalanceRecord
from gimbal.records.store import FILES

logger = logging.getLogger("vllm.gimbal")


class Ledger:
    """Appends records to ``rebalances.jsonl``; keeps the last one open.

    Args:
        directory: where to write; None keeps the last record in memory only.
    """

    def __init__(self, directory: Path | None) -> None:
        self._path = None if directory is None else directory / FILES[RebalanceRecord]
        self._offset = 0
        self.last: RebalanceRecord | None = None
        self.committed = 0
        self.proposed = 0

    def add(self, record: RebalanceRecord) -> None:
        """Writes `record` and leaves it open for `amend`."""
        self.last = record
        self.proposed += 1
        self.committed += record.committed
        self._write(new=True)

    def amend(
        self, stall_us: float | None = None, realized_gain_us_per_step: float | None = None
    ) -> None:
        """Fills fields of the last record that were not known when it was written."""
        if self.last is None:
            return
        if stall_us is not None:
            self.last = replace(self.last, stall_us=stall_us)
        if realized_gain_us_per_step is not None:
            self.last = replace(self.last, realized_gain_us_per_step=realized_gain_us_per_step)
        self._write(new=False)

    def _write(self, new: bool) -> None:
        """The last record as a new line, or over its old one. A full disk must not stop serving."""
        if self._path is None or self.last is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a+", encoding="utf-8") as file:
                end = file.seek(0, SEEK_END)
                # Somebody may have taken the file away since.
                self._offset = end if new or end < self._offset else self._offset
                file.truncate(self._offset)
                file.write(_line(self.last))
        except OSError as error:
            logger.error("Gimbal placement: no more records: %s", error)
            self._path = None


def _line(record: RebalanceRecord) -> str:
    return json.dumps(asdict(record), separators=(",", ":")) + "\n"
