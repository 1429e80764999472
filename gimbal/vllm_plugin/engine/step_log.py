"""One `StepRecord` per engine step, for calibration and reports. Off unless asked for."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import IO

from gimbal.core.contracts import FloatArray
from gimbal.core.snapshot import Field
from gimbal.records.schema import StepRecord

logger = logging.getLogger("vllm.gimbal")

BUFFER_BYTES = 1 << 16
"""Lines are written in blocks: a log must not slow the steps it times."""


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
        total = row[Field.KV_BLOCKS_TOTAL]
        record = StepRecord(
            time_s=round((ended_us - duration_us) / 1e6, 6),
            engine=self._engine,
            duration_us=round(duration_us, 1),
            prefill_tokens=prefill_tokens,
            decode_requests=decodes,
            waiting_requests=int(row[Field.WAITING_REQUESTS]),
            waiting_prefill_tokens=int(row[Field.WAITING_PREFILL_TOKENS]),
            kv_usage=float(row[Field.KV_BLOCKS_USED] / total) if total else 0.0,
            context_tokens=int(row[Field.RUNNING_TOKENS]),
            prefill_pairs=prefill_pairs,
        )
        values = {f.name: getattr(record, f.name) for f in dataclasses.fields(record)}
        line = json.dumps(values, separators=(",", ":")) + "\n"
        if self._file is None:
            self.lost += 1
            return
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
