"""How busy a server and its engines are, for a router before several of them.

    first_token_us = what policy `gimbal` predicts for a typical prompt on each engine

For one that compares engines. For one that compares servers, in requests:

    load = min over engines e of  cost_e / idle_e - 1,  rounded

cost_e is what policy `gimbal` makes of one more typical request on e: its time to first token, and
what it delays. idle_e is the same with nothing waiting or running anywhere. One unit is thus what a
typical request costs a server that has nothing to do; a server's dispatch will choose the engine
with the least. A typical prompt is as long as the mean of those that the engines have taken.
"""

from __future__ import annotations

import numpy as np

from gimbal.core.contracts import DispatchRequest, EngineLoads, FloatArray
from gimbal.core.dispatch.policies.gimbal import GimbalPolicy
from gimbal.core.snapshot import ACCEPTED_REQUESTS, ACCEPTED_TOKENS, ROW_WIDTH, Field

PROMPT_TOKENS = 512
"""Of a typical prompt, before the engines have taken any."""
_MOST = 1_000_000_000
_BUSY = (
    Field.WAITING_REQUESTS,
    Field.WAITING_PREFILL_TOKENS,
    Field.RUNNING_REQUESTS,
    Field.RUNNING_PREFILL_TOKENS,
    Field.DECODING_REQUESTS,
    Field.KV_BLOCKS_USED,
    Field.RUNNING_TOKENS,
    Field.EXPERT_PRESSURE_US,
    Field.AWAITED_KV_TOKENS,
    Field.LOADED_KV_TOKENS,
    Field.LOADING_REQUESTS,
)
"""Columns that are 0 on an engine with nothing to do."""


def server_load(loads: EngineLoads) -> int | None:
    """Requests' worth of work before a typical request; None while no engine has published."""
    there = loads.board[:, Field.SEQUENCE] > 0.0
    if not there.any():
        return None
    policy, zeros = GimbalPolicy(), np.zeros(len(loads.board))
    request = DispatchRequest("", _typical_prompt(loads), 0.0)
    cost = policy.costs(request, loads._replace(cached_tokens=zeros))
    idle = loads.board.copy()
    idle[:, list(_BUSY)] = 0.0
    alone = policy.costs(
        request,
        loads._replace(
            board=idle,
            unacked_requests=zeros,
            unacked_tokens=zeros,
            unacked_cached_tokens=zeros,
            cached_tokens=zeros,
        ),
    )
    ahead = float((cost[there] / np.maximum(alone[there], 1.0)).min()) - 1.0
    return round(min(max(ahead, 0.0), _MOST))


def first_token_us(loads: EngineLoads) -> FloatArray:
    """[engines] predicted microseconds to the first token of a typical prompt that is not cached;
    0 for an engine that has not published. See `GimbalPolicy.first_token_us`."""
    request = DispatchRequest("", _typical_prompt(loads), 0.0)
    zeros = np.zeros(len(loads.board))
    us = GimbalPolicy().first_token_us(request, loads._replace(cached_tokens=zeros))
    return np.where(loads.column(Field.SEQUENCE) > 0.0, us, 0.0)


def _typical_prompt(loads: EngineLoads) -> int:
    requests = loads.board[:, ACCEPTED_REQUESTS:ACCEPTED_TOKENS].sum()
    tokens = loads.board[:, ACCEPTED_TOKENS:ROW_WIDTH].sum()
    return max(1, round(tokens / requests)) if requests else PROMPT_TOKENS
