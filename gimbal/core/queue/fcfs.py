"""First come, first served: vLLM's default. ``key = 0``, so that ties (arrival) decide."""

from __future__ import annotations

from gimbal.core.contracts import QueuedRequest, QueueState


class FcfsOrdering:
    """Arrival order."""

    def key(self, request: QueuedRequest, state: QueueState) -> float:
        return 0.0
