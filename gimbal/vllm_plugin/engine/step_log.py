"""One `StepRecord` per engine step, for calibration and reports. Off unless asked for."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from gimbal.core.contracts import FloatArray
from gimbal.core.snapshot import Field
from gimbal.records.schema import StepRecord

BUFFER_BYTES = 1 << 16
"""Lines are written in blocks: a log must not slow the steps it times."""


class StepLog:
    """Appends one engine's steps to ``steps-ENGINE.jsonl`` in `directory`, which it makes."""

    def __init__(self, directory: Path, engine: int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._engine = engine
        self._file = (directory / f"steps-{engine}.jsonl").open(
            "a", encoding="utf-8", buffering=BUFFER_BYTES
        )

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
        self._file.write(json.dumps(values, separators=(",", ":")) + "\n")

    def flush(self) -> None:
        """Puts what is buffered on disk; called when the engine falls idle."""
        self._file.flush()

    def close(self) -> None:
        self._file.close()
