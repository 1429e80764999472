"""llm-d's default scorers.

    score_e = 2 * queue_e + 2 * (1 - kv_usage_e) + 3 * cached_e / prompt
    queue_e = (max waiting - waiting_e) / (max waiting - min waiting), 1 when all are equal

The highest score wins, so the cost is its negative. Waiting requests are the engine's own count:
llm-d scrapes it and keeps no account of what it sent in between (llm-d-router #298).

Source: llm-d-router, plugin defaults queue 2, kv-cache-utilization 2, prefix 3, max-score picker.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gimbal.core.contracts import DispatchRequest, EngineLoads, FloatArray
from gimbal.core.options import Finite, option
from gimbal.core.snapshot import Field


@dataclass(frozen=True, slots=True)
class LlmDOptions:
    """Options of dispatch policy `llm-d`."""

    queue: Finite = option(2.0, "weight of the queue score")
    kv: Finite = option(2.0, "weight of the KV-cache score")
    prefix: Finite = option(3.0, "weight of the prefix score")


class LlmDPolicy:
    """Weighted sum of three scores in [0, 1]."""

    Options = LlmDOptions

    def __init__(self, options: LlmDOptions = LlmDOptions()) -> None:
        self._queue, self._kv, self._prefix = options.queue, options.kv, options.prefix

    def costs(self, request: DispatchRequest, loads: EngineLoads) -> FloatArray:
        """[engines] negative scores."""
        waiting = loads.column(Field.WAITING_REQUESTS)
        most, least = waiting.max(), waiting.min()
        queue = (most - waiting) / (most - least) if most > least else np.ones(len(waiting))
        total = loads.column(Field.KV_BLOCKS_TOTAL)
        free = 1.0 - loads.column(Field.KV_BLOCKS_USED) / np.maximum(total, 1.0)
        cached = loads.cached_tokens / max(1, request.prompt_tokens)
        score: FloatArray = self._queue * queue + self._kv * free + self._prefix * cached
        return -score
