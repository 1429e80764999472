"""Dynamo's KV router.

    cost_e = prefill_load_scale * max(0, raw_prefill_blocks_e - overlap_blocks_e)
             + decode_blocks_e + decode_active_request_weight * active_requests_e

with raw_prefill_blocks_e the blocks still to be prefilled on e plus this whole prompt,
overlap_blocks_e the blocks of the prompt cached on e (device credit 1.0, no decay), and
decode_blocks_e the KV blocks in use, which a router of prefill engines does not track. Defaults:
scale 1, request weight 0, temperature 0.

Source: Dynamo 1.6, `lib/kv-router/src/scheduling/selector/default.rs`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gimbal.core.contracts import DispatchRequest, EngineLoads, FloatArray
from gimbal.core.options import Finite, option
from gimbal.core.snapshot import Field

_BLOCK_TOKENS = 16.0  # where an engine has not published its own


@dataclass(frozen=True, slots=True)
class DynamoOptions:
    """Options of dispatch policy `dynamo`, under Dynamo's names."""

    prefill_load_scale: Finite = option(1.0, "weight of prefill against KV blocks")
    decode_active_request_weight: Finite = option(
        0.0, "blocks that one unfinished request stands for"
    )
    track_active_blocks: bool = option(True, "count KV blocks in use")


class DynamoPolicy:
    """Uncached prefill blocks plus KV blocks in use."""

    Options = DynamoOptions

    def __init__(self, options: DynamoOptions = DynamoOptions()) -> None:
        self._scale = options.prefill_load_scale
        self._request_weight = options.decode_active_request_weight
        self._tracks_blocks = options.track_active_blocks

    def costs(self, request: DispatchRequest, loads: EngineLoads) -> FloatArray:
        """[engines] blocks."""
        block = loads.column(Field.KV_BLOCK_TOKENS)
        block = np.where(block > 0, block, _BLOCK_TOKENS)
        prefill = (
            loads.column(Field.WAITING_PREFILL_TOKENS)
            + loads.column(Field.RUNNING_PREFILL_TOKENS)
            + loads.unacked_tokens
            + request.prompt_tokens
        )
        cost = self._scale * np.maximum(0.0, prefill - loads.cached_tokens) / block
        if self._tracks_blocks:
            cost += loads.column(Field.KV_BLOCKS_USED)
        if self._request_weight:
            cost += self._request_weight * (
                loads.column(Field.WAITING_REQUESTS)
                + loads.column(Field.RUNNING_REQUESTS)
                + loads.unacked_requests
            )
        return np.asarray(cost)
