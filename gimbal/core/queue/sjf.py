"""Shortest (uncached) prefill first, without aging: ``key = uncached_tokens``.

The mean's lower envelope and starvation's upper one: a long prompt waits while shorter ones come.
SGLang's ``shortest-prefill-first`` and vLLM #29366 order this way.
"""

from __future__ import annotations

from gimbal.core.contracts import QueuedRequest, QueueState


class SjfOrdering:
    """Least uncached prefill work first."""

    def key(self, request: QueuedRequest, state: QueueState) -> float:
        return float(request.uncached_tokens)
