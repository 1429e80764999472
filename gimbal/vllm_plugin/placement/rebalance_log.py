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

from gimbal.core.contracts import FloatArray, IntArray
from gimbal.records.placements import placement_record
from gimbal.records.schema import PlacementRecord, RebalanceRecord
from gimbal.records.store import FILES

logger = logging.getLogger("vllm.gimbal")


class RebalanceLog:
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

    def snapshot(self, pairs: FloatArray, before: IntArray, after: IntArray, ranks: int) -> None:
        """Writes who asked for what, where experts were and where the last record has them go.

        Of the first proposal and of those that were committed; arguments as in
        `placement_record`.
        """
        last = self.last
        if self._path is None or last is None or not (last.committed or self.proposed == 1):
            return
        slots = before.shape[1] // ranks
        record = placement_record(last.time_s, last.committed, pairs, before, after, slots)
        path = self._path.with_name(FILES[PlacementRecord])
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(_line(record))
        except OSError as error:
            logger.error("Gimbal placement: placement not recorded: %s", error)

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


def _line(record: RebalanceRecord | PlacementRecord) -> str:
    return json.dumps(asdict(record), separators=(",", ":")) + "\n"
