"""First come, first served, as vLLM does it: ``key = arrival_s`` (see `QueuedRequest`)."""

from __future__ import annotations

from gimbal.core.contracts import QueuedRequest, QueueState


class FcfsOrdering:
    """Order of arrival."""

    def key(self, request: QueuedRequest, state: QueueState) -> float:
        return request.arrival_s
