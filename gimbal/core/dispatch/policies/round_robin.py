"""Round robin: each engine in turn.

    cost_e = 0, so that the rotation decides

Source: vLLM's external load balancing behind a round-robin proxy, and the rank round robin by
`X-data-parallel-rank` that public benchmarks use as the balanced reference (InferenceX #2696).
"""

from __future__ import annotations

import numpy as np

from gimbal.core.contracts import DispatchRequest, EngineLoads, FloatArray


class RoundRobinPolicy:
    """Ignores every signal."""

    def costs(self, request: DispatchRequest, loads: EngineLoads) -> FloatArray:
        """[engines] zeros."""
        return np.zeros(len(loads.board))
