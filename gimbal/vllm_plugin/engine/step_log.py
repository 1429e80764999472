"""One `StepRecord` per engine step, for calibration and reports. Off unless asked for."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import IO

from gimbal.core.contracts import FloatArray
from gimbal.core.snapshot import Field
from gimbal.records.schema import StepRecord

logger = logging.getLogger("vllm.gimbal")

BUFFER_BYTES = 1 << 16
"""Lines are written in blocks: a log must not slow the steps it times."""
_LINE = "{" + ",".join(f'"{f.name}":%r' for f in dataclasses.fields(StepRecord)) + "}\n"
"""JSON of a record's values in their order: whole numbers and floats, whose `repr` it is."""


class StepLog:
    """Appends one engine's steps to ``steps-ENGINE.jsonl`` in `directory`, which it makes.

    A record that cannot be written never hurts the step it tells of. The first failure is logged;
    later steps are written again once the disk takes them.

    Attributes:
        lost: records that could not be written.
    """

    def __init__(self, directory: Path, engine: int) -> None:
        self.lost = 0
        self._engine = engine
        self._said = False
        self._path = directory / f"steps-{engine}.jsonl"
        self._file: IO[bytes] | None = None
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("ab", buffering=BUFFER_BYTES)
        except OSError as error:
            self._failed(error)

    def write(
        self,
        row: FloatArray,
        ended_us: float,
        duration_us: float,
        prefill_tokens: int,
        prefill_pairs: float,
        decodes: int,
    ) -> None:
        """Records a finished step; `row` is the snapshot it leaves behind."""
        if self._file is None:
            self.lost += 1
            return
        total = row.item(Field.KV_BLOCKS_TOTAL)
        line = _LINE % (
            round((ended_us - duration_us) / 1e6, 6),
            self._engine,
            round(duration_us, 1),
            prefill_tokens,
            decodes,
            int(row.item(Field.WAITING_REQUESTS)),
            int(row.item(Field.WAITING_PREFILL_TOKENS)),
            row.item(Field.KV_BLOCKS_USED) / total if total else 0.0,
            int(row.item(Field.RUNNING_TOKENS)),
            prefill_pairs,
        )
        try:
            self._file.write(line.encode())  # all of it, or nothing: what is buffered waits
        except OSError as error:
            self.lost += 1
            self._failed(error)

    def flush(self) -> None:
        """Puts what is buffered on disk; called when the engine falls idle."""
        if self._file is not None:
            try:
                self._file.flush()
            except OSError as error:
                self._failed(error)

    def close(self) -> None:
        """Writes what is left, as far as the disk takes it."""
        if self._file is not None:
            try:
                self._file.close()
            except OSError as error:
                self._failed(error)

    def _failed(self, error: OSError) -> None:
        if not self._said:
            self._said = True
            logger.error("Gimbal: steps not recorded, serving goes on: %s: %s", self._path, error)
