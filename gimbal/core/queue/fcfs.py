"""First come, first served, as vLLM does it: by the time of queueing, ``key = now_s``."""

from __future__ import annotations

from gimbal.core.contracts import QueuedRequest, QueueState


class FcfsOrdering:
    """Order of queueing."""

    def key(self, request: QueuedRequest, state: QueueState) -> float:
        return state.now_s
