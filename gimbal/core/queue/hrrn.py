"""Highest response ratio next, as SGLang orders its queue (sgl-project/sglang #32911).

``ratio = (prefill tokens served since the request was queued) / uncached tokens``, highest first.
Age is counted in served prefill work instead of seconds. The ratios cross over time, so the queue
is sorted anew before every pass; above 128 waiting requests SGLang keeps arrival order instead.
"""

from __future__ import annotations

from collections.abc import Sequence

from gimbal.core.contracts import OrderingTraits, QueuedRequest, QueueState

FCFS_ABOVE = 128
"""Waiting requests beyond which the order is FCFS, as in SGLang."""


class HrrnOrdering:
    """Highest served-work-to-own-work ratio first; dynamic."""

    traits = OrderingTraits(dynamic=True)

    def __init__(self) -> None:
        self._arrival_order = False  # every key is 0 already

    def key(self, request: QueuedRequest, state: QueueState) -> float:
        served = state.served_tokens - request.served_before_tokens
        return -served / max(1, request.uncached_tokens)

    def keys(self, requests: Sequence[QueuedRequest], state: QueueState) -> list[float] | None:
        """Ratios of all waiting requests; zeros (arrival order) when there are too many."""
        if len(requests) > FCFS_ABOVE:
            # A request that is queued now gets key 0 by itself: nothing to sort again.
            already, self._arrival_order = self._arrival_order, True
            return None if already else [0.0] * len(requests)
        self._arrival_order = False
        return [self.key(request, state) for request in requests]
