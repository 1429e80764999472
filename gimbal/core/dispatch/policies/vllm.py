"""vLLM's own dispatch, 0.30 to 0.33.

    cost_e = max(clients * inflight_e, waiting_e + running_e)
             + 6 * waiting_e * max(0, kv_usage_e - 0.5)      if waiting_e > 0

where waiting_e includes `clients` for each pick since the last snapshot. KV usage has no effect
while nothing waits.

Source: `DPLBAsyncMPClient.get_core_engine_for_request` (PR #49204). In vLLM the hook calls that
method itself; this is for the simulator. It is a little kinder to vLLM than the original: there
snapshots arrive through the coordinator, at most every 100 ms and only when the counts changed.
"""

from __future__ import annotations

import numpy as np

from gimbal.core.contracts import DispatchRequest, EngineLoads, FloatArray
from gimbal.core.snapshot import Field


class VllmPolicy:
    """In-flight or reported requests, whichever is more, plus a KV penalty on the queue."""

    def costs(self, request: DispatchRequest, loads: EngineLoads) -> FloatArray:
        """[engines] requests."""
        waiting = loads.column(Field.WAITING_REQUESTS) + loads.client_count * loads.unacked_requests
        reported = waiting + loads.column(Field.RUNNING_REQUESTS)
        total = loads.column(Field.KV_BLOCKS_TOTAL)
        usage = loads.column(Field.KV_BLOCKS_USED) / np.maximum(total, 1.0)
        score: FloatArray = np.maximum(loads.client_count * loads.inflight_requests, reported)
        score += waiting * 6.0 * np.maximum(0.0, usage - 0.5)
        return score
