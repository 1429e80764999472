"""One `RebalanceRecord` per rearrangement, what was predicted beside what came of it.

What came of it is known at the next rearrangement: the counts that followed price the map that
was replaced and the one that replaced it. Only then is the record complete; until then its line
stands with the realized fields empty and is rewritten in place when they are known.
"""

from __future__ import annotations

import errno
import json
import logging
import os
from dataclasses import asdict, replace
from pathlib import Path

from gimbal.core.contracts import FloatArray, IntArray
from gimbal.core.snapshot import Field
from gimbal.records.placements import placement_record
from gimbal.records.schema import PlacementRecord, RebalanceRecord
from gimbal.records.store import FILES

logger = logging.getLogger("vllm.gimbal")

_FIGURES = tuple(
    field for field in Field if Field.PLACEMENT_PROPOSALS <= field <= Field.PLACEMENT_LOCAL_SHARE
)


class RebalanceLog:
    """Appends records to ``rebalances.jsonl``; keeps the last one open.

    A record that cannot be written never hurts serving. The first failure is logged; later
    records are written again once the disk takes them.

    Args:
        directory: where to write; None keeps the last record in memory only.

    Attributes:
        lost: times that writing failed.
        figures: what came of all records, by column of an engine's row.
        unsent: `figures` have changed since somebody last set this to False.
    """

    def __init__(self, directory: Path | None) -> None:
        self._path = None if directory is None else directory / FILES[RebalanceRecord]
        self._offset: int | None = None  # of the last record's line; None when it has none
        self.last: RebalanceRecord | None = None
        self.committed = 0
        self.proposed = 0
        self.lost = 0
        self.figures = dict.fromkeys(_FIGURES, 0.0)
        self.unsent = False

    def add(self, record: RebalanceRecord, expert_bytes: float = 0.0) -> None:
        """Writes `record` and leaves it open for `amend`.

        `expert_bytes` are the weights of one expert of one layer.
        """
        self.last = record
        self.proposed += 1
        self.committed += record.committed
        self._count(record, expert_bytes)
        self._write(new=True)

    def _count(self, record: RebalanceRecord, expert_bytes: float) -> None:
        figures = self.figures
        figures[Field.PLACEMENT_PROPOSALS] = self.proposed
        figures[Field.PLACEMENT_COMMITS] = self.committed
        balance, local_share = record.balance_before, record.local_share_before
        if record.committed:
            balance, local_share = record.balance_after, record.local_share_after
            figures[Field.PLACEMENT_RECEIVED_EXPERTS] += record.received_experts
            figures[Field.PLACEMENT_RECEIVED_BYTES] += record.received_experts * expert_bytes
            self._set_gain(Field.PLACEMENT_PREDICTED_GAIN_US, record.predicted_gain_us_per_step)
        figures[Field.PLACEMENT_BALANCE] = balance
        figures[Field.PLACEMENT_LOCAL_SHARE] = local_share or 0.0
        self.unsent = True

    def _set_gain(self, field: Field, gain_us: float) -> None:
        """Into column `field`, or as a loss into the one after it."""
        self.figures[field] = max(gain_us, 0.0)
        self.figures[Field(field + 1)] = max(-gain_us, 0.0)
        self.unsent = True

    def amend(
        self, stall_us: float | None = None, realized_gain_us_per_step: float | None = None
    ) -> None:
        """Fills fields of the last record that were not known when it was written."""
        if self.last is None:
            return
        if stall_us is not None:
            self.last = replace(self.last, stall_us=stall_us)
            self.figures[Field.PLACEMENT_STALL_US] += stall_us
            self.unsent = True
        if realized_gain_us_per_step is not None:
            self.last = replace(self.last, realized_gain_us_per_step=realized_gain_us_per_step)
            self._set_gain(Field.PLACEMENT_REALIZED_GAIN_US, realized_gain_us_per_step)
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
        self._append(self._path.with_name(FILES[PlacementRecord]), _line(record))

    def _write(self, new: bool) -> None:
        """The last record as a new line, or over its old one."""
        if self._path is None or self.last is None:
            return
        self._offset = self._append(self._path, _line(self.last), None if new else self._offset)

    def _append(self, path: Path, line: str, at: int | None = None) -> int | None:
        """Writes `line` at the file's end, or at byte `at` in place of what stands from there on.

        Returns where it begins, None when it could not be written: the file then ends with the
        whole line before it.
        """
        data = line.encode()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab", buffering=0) as file:
                # Somebody may have taken the file away since.
                begin = min(file.tell() if at is None else at, file.tell())
                file.truncate(begin)
                if file.write(data) == len(data):
                    return begin
                file.truncate(begin)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self.lost += 1
            if self.lost == 1:
                logger.error("Gimbal placement: no records, serving goes on: %s: %s", path, error)
            return None


def _line(record: RebalanceRecord | PlacementRecord) -> str:
    return json.dumps(asdict(record), separators=(",", ":")) + "\n"
