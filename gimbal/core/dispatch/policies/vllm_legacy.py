"""vLLM's dispatch before July 2026, the baseline of the Gimbal paper and of most others.

    cost_e = 4 * waiting_e + running_e

with the front end's own picks since the last snapshot counted as waiting, each standing for one
pick of every API server. Requests, never tokens.

Source: vLLM 0.11 to 0.2x, `DPLBAsyncMPClient.get_core_engine_for_request`, until PR #49204. There
a pick counts until the next snapshot of the coordinator arrives; here until the engine has
acknowledged it, which never counts a request twice.
"""

from __future__ import annotations

from gimbal.core.contracts import DispatchRequest, EngineLoads, FloatArray
from gimbal.core.snapshot import Field


class VllmLegacyPolicy:
    """`4 * waiting + running`."""

    def costs(self, request: DispatchRequest, loads: EngineLoads) -> FloatArray:
        """[engines] weighted requests."""
        waiting = loads.column(Field.WAITING_REQUESTS)
        waiting = waiting + loads.client_count * loads.unacked_requests
        return 4.0 * waiting + loads.column(Field.RUNNING_REQUESTS)
