"""LMetric: vllm-router's `kv_aware` policy.

    cost_e = (new_prefill_e + active_prefill_e) * (active_requests_e + 1)

with new_prefill_e the prompt's tokens that engine e has not cached (device credit 1.0),
active_prefill_e the prompt tokens still to be computed there, and active_requests_e all its
unfinished requests.

Source: vllm-router 0.1.17, `kv_aware` with temperature 0. The router keeps both sums itself; here
they come from the snapshot and the unacknowledged account, which is never older.
"""

from __future__ import annotations

from gimbal.core.contracts import DispatchRequest, EngineLoads, FloatArray
from gimbal.core.snapshot import Field


class LMetricPolicy:
    """Prefill work times requests."""

    def costs(self, request: DispatchRequest, loads: EngineLoads) -> FloatArray:
        """[engines] token-requests."""
        new = request.prompt_tokens - loads.cached_tokens
        active = (
            loads.column(Field.WAITING_PREFILL_TOKENS)
            + loads.column(Field.RUNNING_PREFILL_TOKENS)
            + loads.unacked_tokens
        )
        requests = (
            loads.column(Field.WAITING_REQUESTS)
            + loads.column(Field.RUNNING_REQUESTS)
            + loads.unacked_requests
        )
        return (new + active) * (requests + 1.0)
