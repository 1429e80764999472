"""Gimbal's dispatch: every consequence of a choice as predicted microseconds.

The engines of a Mixture-of-Experts model run in lock step: each step lasts as long as the slowest
engine's. Engine e takes at most R_e = token budget - decoding requests prefill tokens per step,
and a step that carries m prefill tokens on its fullest engine lasts

    base + c * m

with base (a step without prefill) and c (microseconds per prefill token) learned online. Let W_e
be the prefill tokens queued or running on e, acknowledged or not, u_e the tokens of this prompt e
has not cached, and W the largest W_e. If the request goes to e, its last chunk runs in step
k_e = ceil((W_e + u_e) / R_e), and the time to its first token is

    k_e * base + c * (W_e + u_e)

It is split for the metrics into

    queue     (c + base / R_e) * W_e: the work before it
    prefill   c * u_e + base * (k_e - W_e / R_e): its own

The same steps also carry the chunks of the other engines, and last as long as the fullest. That is
left out: counted, it makes all engines behind the longest queue look alike, and what is then
decided by smaller terms costs later requests more than the estimate gains
(reproduction/results/dispatch.md).

What it costs others, each microsecond of delay of each request counting the same:

    interference  c * max(0, W_e + u_e - W) * decoding requests of all engines: prefill beyond the
                  longest queue lengthens steps that every engine's decodes wait for; prefill in
                  the shadow of another engine's costs them nothing.
    reuse         prefix reuse * c * u_e * (1 + decoding requests of all engines): what is computed
                  here takes the place of something cached on e, which is asked for again with
                  about the probability that a prompt token is cached anywhere (measured), and is
                  then computed again while everybody's decodes wait. Without this term a busy
                  moment copies a shared prefix to every engine, and the copies evict each other.

And what it meets afterwards:

    decode     expected output tokens * d * n_e, d being what one decoding request adds to a step
               and n_e the requests that decode or will decode on e: the mean of their number and
               of their context in units of the group's mean request, since the learned d does not
               tell the cost per request from the cost per context token. What a KV connector
               loads is context already
    admission  KV tokens or request slots it lacks on e, turned over at the rate at which e
               prefills: what does not fit waits until as much has left
    expert     feedback weight * what e's experts cost above the engine they cost least * k_e

R_e is a shared R, the mean over engines, where only base / R is needed. Before the first steps
have been measured, base is 0 and c is 1: the order is then by tokens.

Source: the shape of the cost (pressure of queue, KV and experts in one score) is the Gimbal
paper's, arXiv 2606.15177; the pricing in time and the lock-step shadow are this project's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from gimbal.core.compiled import Kernel
from gimbal.core.contracts import DispatchRequest, EngineLoads, FloatArray
from gimbal.core.options import NotNegative, option
from gimbal.core.snapshot import Field

_TERMS = (
    "queue",
    "prefill",
    "interference",
    "reuse",
    "decode",
    "expert",
    "admission",
)
_QUEUE, _PREFILL, _INTERFERENCE, _REUSE, _DECODE, _EXPERT, _ADMISSION = range(len(_TERMS))

# Plain integers, which the compiler freezes into the code.
_WAITING, _WAITING_TOKENS = int(Field.WAITING_REQUESTS), int(Field.WAITING_PREFILL_TOKENS)
_RUNNING, _RUNNING_PREFILL = int(Field.RUNNING_REQUESTS), int(Field.RUNNING_PREFILL_TOKENS)
_DECODING, _RUNNING_TOKENS = int(Field.DECODING_REQUESTS), int(Field.RUNNING_TOKENS)
_KV_USED, _KV_TOTAL, _KV_BLOCK = (
    int(f) for f in (Field.KV_BLOCKS_USED, Field.KV_BLOCKS_TOTAL, Field.KV_BLOCK_TOKENS)
)
_AWAITED, _LOADED, _LOADS = (
    int(f) for f in (Field.AWAITED_KV_TOKENS, Field.LOADED_KV_TOKENS, Field.LOADING_REQUESTS)
)
_BUDGET, _SEATS = int(Field.STEP_TOKEN_BUDGET), int(Field.MAX_RUNNING_REQUESTS)
_PRESSURE, _RATE = int(Field.EXPERT_PRESSURE_US), int(Field.PREFILL_TOKENS_PER_S)
_STEP_BASE, _TOKEN, _DECODE_SLOPE = (
    int(f) for f in (Field.STEP_BASE_US, Field.PREFILL_US_PER_TOKEN, Field.DECODE_US_PER_REQUEST)
)
_UNKNOWN_BUDGET = 2048.0  # vLLM's default, until an engine has published its own


@dataclass(frozen=True, slots=True)
class GimbalPolicyOptions:
    """Options of dispatch policy `gimbal`."""

    session_patience: NotNegative = option(
        1.0, "keep a conversation while it costs at most this many re-prefills of its unknown part"
    )
    expected_output_tokens: NotNegative = option(
        57.0, "output length assumed in pricing decode load (BurstGPT's mean)"
    )


class GimbalPolicy:
    """Predicted time to first token plus the delay caused to others."""

    Options = GimbalPolicyOptions
    term_names = _TERMS

    def __init__(self, options: GimbalPolicyOptions = GimbalPolicyOptions()) -> None:
        self._output_tokens = options.expected_output_tokens
        self._patience = options.session_patience

    def costs(self, request: DispatchRequest, loads: EngineLoads) -> FloatArray:
        """[engines] microseconds."""
        costs: FloatArray = self.priced(request, loads)[-1]
        return costs

    def priced(self, request: DispatchRequest, loads: EngineLoads) -> FloatArray:
        """[terms + 1, engines] microseconds: one row per term, and their sum."""
        board = loads.board
        out: FloatArray = np.empty((len(_TERMS) + 1, board.shape[0]))
        PRICE.call(
            board,
            loads.unacked_requests,
            loads.unacked_tokens,
            loads.unacked_cached_tokens,
            loads.cached_tokens,
            float(request.prompt_tokens),
            self._output_tokens,
            loads.prefix_reuse,
            loads.feedback_weight,
            out,
        )
        return out

    def first_token_us(self, request: DispatchRequest, loads: EngineLoads) -> FloatArray:
        """[engines] microseconds to the first token: what `priced` predicts, without what the
        choice delays and what follows the first token. In tokens before steps are measured."""
        terms = self.priced(request, loads)
        us: FloatArray = terms[_QUEUE] + terms[_PREFILL] + terms[_ADMISSION]
        return us

    def session_bound_us(self, request: DispatchRequest, loads: EngineLoads, engine: int) -> float:
        """What prefilling the rest of the prompt costs: the most a longer hit there can save.

        The prefix index holds prompts only; the answers of earlier turns, which are part of this
        prompt, are cached on the session's engine without the index knowing.
        """
        unknown = request.prompt_tokens - float(loads.cached_tokens[engine])
        token_us = float(loads.column(Field.PREFILL_US_PER_TOKEN).max())
        if token_us <= 0.0:
            return self._patience * unknown
        budget = float(loads.board[engine, _BUDGET]) or _UNKNOWN_BUDGET
        base_us = float(loads.column(Field.STEP_BASE_US).max())
        return self._patience * (token_us + base_us / budget) * unknown


def _price(
    board: FloatArray,
    unacked_requests: FloatArray,
    unacked_tokens: FloatArray,
    unacked_cached_tokens: FloatArray,
    cached_tokens: FloatArray,
    prompt_tokens: float,
    output_tokens: float,
    prefix_reuse: float,
    feedback_weight: float,
    out: FloatArray,
) -> None:
    """Fills `out` [terms + 1, engines]: every term in microseconds, and their sum."""
    engines = board.shape[0]
    base_us = token_us = decode_us = rooms = decoding = running = context = longest = 0.0
    # What all engines are pressed by alike cannot be avoided by choosing another one.
    common_us = board[0, _PRESSURE]
    for e in range(engines):
        row = board[e]
        base_us = max(base_us, row[_STEP_BASE])
        token_us = max(token_us, row[_TOKEN])
        decode_us = max(decode_us, row[_DECODE_SLOPE])
        common_us = min(common_us, row[_PRESSURE])
        decoding += row[_DECODING]
        running += row[_RUNNING] + row[_LOADS]
        context += row[_RUNNING_TOKENS] + row[_AWAITED] + row[_LOADED]
        room = _UNKNOWN_BUDGET
        if row[_BUDGET] != 0.0:
            room = max(1.0, row[_BUDGET] - row[_DECODING])
        backlog = row[_WAITING_TOKENS] + row[_RUNNING_PREFILL]
        backlog += unacked_tokens[e] - unacked_cached_tokens[e]
        rooms += room
        longest = max(longest, backlog)
        # Kept for the second pass, which replaces them.
        out[_PREFILL, e], out[_QUEUE, e] = room, backlog
    if token_us <= 0.0:
        base_us, token_us, decode_us = 0.0, 1.0, 1.0
    # A decoding request is at least one token of the step.
    decode_us = 0.5 * output_tokens * max(decode_us, token_us)
    slice_us = token_us + base_us * engines / rooms
    stall_us = token_us * decoding
    heads_per_token = running / max(1.0, context)

    for e in range(engines):
        row = board[e]
        room, backlog = out[_PREFILL, e], out[_QUEUE, e]
        waiting = row[_WAITING] + unacked_requests[e]
        uncached = prompt_tokens - cached_tokens[e]
        work = backlog + uncached
        steps = math.ceil(work / room)

        out[_QUEUE, e] = slice_us * backlog
        out[_PREFILL, e] = base_us * steps + token_us * work - slice_us * backlog
        out[_INTERFERENCE, e] = stall_us * max(0.0, work - longest)
        out[_REUSE, e] = prefix_reuse * (token_us + stall_us) * uncached
        held_tokens = row[_RUNNING_TOKENS] + row[_AWAITED] + row[_LOADED]
        heads = waiting + row[_RUNNING] + held_tokens * heads_per_token
        out[_DECODE, e] = decode_us * heads
        out[_EXPERT, e] = feedback_weight * (row[_PRESSURE] - common_us) * steps

        lack = 0.0  # tokens
        if row[_KV_TOTAL] > 0.0:
            held = (row[_KV_USED] - row[_KV_TOTAL]) * row[_KV_BLOCK]
            held += row[_WAITING_TOKENS] + row[_AWAITED] + unacked_tokens[e]
            lack = max(lack, held + prompt_tokens)
        if row[_SEATS] > 0.0:
            mean_tokens = row[_RUNNING_TOKENS] / max(row[_RUNNING], 1.0)
            lack = max(lack, (waiting + row[_RUNNING] + 1.0 - row[_SEATS]) * mean_tokens)
        # Below a token a second nothing has been measured, and the quotient may be infinite.
        out[_ADMISSION, e] = lack * (1e6 / row[_RATE] if row[_RATE] >= 1.0 else slice_us)

        total = 0.0
        for term in range(out.shape[0] - 1):
            total += out[term, e]
        out[-1, e] = total


PRICE = Kernel(
    _price,
    "void(f8[:,::1], f8[::1], f8[::1], f8[::1], f8[::1], f8, f8, f8, f8, f8[:,::1])",
)
