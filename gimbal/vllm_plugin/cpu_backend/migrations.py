"""Counts the experts that really moved, and notices when EPLB's asynchronous worker is dead.

A failing worker thread raises no alarm in vLLM: serving goes on, the steps until the next
rearrangement run negative, and no expert ever moves again.
"""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

logger = logging.getLogger("vllm.gimbal")

STUCK_AFTER_S = 120.0
"""An asynchronous rearrangement without a committed layer for this long is reported."""


@dataclass(slots=True)
class MigrationReport:
    """Totals since the model was loaded; the same on every rank, which all commit the same maps.

    Attributes:
        rearrangements: map changes that were carried out (sync) or completed (async).
        layers: layer maps committed with a change.
        slots: physical slots that got another logical expert.
        worker: "none" (synchronous EPLB), "alive", "dead" or "stuck".
    """

    rearrangements: int = 0
    layers: int = 0
    slots: int = 0
    worker: str = "none"


@dataclass(slots=True)
class MigrationCounter:
    """Compares the committed maps after each EPLB step with those before it."""

    report: MigrationReport = field(default_factory=MigrationReport)
    _maps: dict[str, np.ndarray] = field(default_factory=dict)
    _changed_since_complete: bool = False
    _progress_s: float = 0.0

    def after_step(self, state: Any, now_s: float | None = None) -> None:
        """Reads vLLM's ``EplbState``; `now_s` is a monotonic time for tests."""
        now = time.monotonic() if now_s is None else now_s
        moved_layers = 0
        for key, model in state.model_states.items():
            current = model.physical_to_logical_map.numpy()
            before = self._maps.get(key)
            if before is None or before.shape != current.shape:
                self._maps[key] = current.copy()
            elif not np.array_equal(before, current):
                changed = before != current
                moved_layers += int(changed.any(axis=1).sum())
                self.report.slots += int(changed.sum())
                before[...] = current
        self.report.layers += moved_layers
        self._changed_since_complete |= moved_layers > 0
        busy = state.is_async and any(m.rebalanced for m in state.model_states.values())
        if self._changed_since_complete and not busy:
            self._changed_since_complete = False
            self.report.rearrangements += 1
        if moved_layers or not busy:
            self._progress_s = now
        if state.is_async:
            # The level `placement` has a watch of its own.
            watched = getattr(state, "_gimbal_member", None) is not None
            self._watch_worker(state.async_worker, now, say=not watched)

    def _watch_worker(self, thread: Any, now_s: float, say: bool) -> None:
        if thread is None or not thread.is_alive():
            status = "dead"
        elif now_s - self._progress_s > STUCK_AFTER_S:
            status = "stuck"
        else:
            status = "alive"
        if say and status in ("dead", "stuck") and status != self.report.worker:
            logger.error(
                "Gimbal: the asynchronous EPLB worker of this rank is %s: serving goes on, "
                "experts no longer move",
                status,
            )
        self.report.worker = status

    def as_dict(self) -> dict[str, int | str]:
        return asdict(self.report)
