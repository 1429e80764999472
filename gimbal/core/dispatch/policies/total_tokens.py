"""SGLang's `total_tokens` balance of data-parallel attention ranks.

    cost_e = (tokens_e, requests_e) in lexicographic order
    tokens_e = context tokens of running requests + prompt tokens of waiting ones
    requests_e = running_e + waiting_e

with a request's tokens added the moment it is sent. Prefix caches play no part.

Source: SGLang 0.5.23, `data_parallel_controller.py` (`total_tokens`, before #16258
`minimum_tokens`). Tokens are whole numbers, so requests scaled below one order the ties.
"""

from __future__ import annotations

import numpy as np

from gimbal.core.contracts import DispatchRequest, EngineLoads, FloatArray
from gimbal.core.snapshot import ROW_WIDTH, Field

_TOKENS = np.zeros(ROW_WIDTH)
"""1 for the columns that count tokens held and queued; whole numbers, so their sum is exact."""
_TOKENS[
    [
        Field.RUNNING_TOKENS,
        Field.WAITING_PREFILL_TOKENS,
        Field.PENDING_PREFIX_HIT_TOKENS,
        Field.AWAITED_KV_TOKENS,
        Field.LOADED_KV_TOKENS,
    ]
] = 1.0


class TotalTokensPolicy:
    """Fewest tokens held and queued, then fewest requests."""

    def costs(self, request: DispatchRequest, loads: EngineLoads) -> FloatArray:
        """[engines] tokens, plus a fraction that orders equal ones by requests."""
        tokens: FloatArray = loads.board.dot(_TOKENS) + loads.unacked_tokens
        requests: FloatArray = (
            loads.column(Field.RUNNING_REQUESTS)
            + loads.column(Field.WAITING_REQUESTS)
            + loads.unacked_requests
        )
        tokens += requests / (requests.max() + 1.0)
        return tokens
