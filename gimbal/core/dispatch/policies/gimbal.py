"""Gimbal's dispatch: every consequence of a choice as predicted microseconds.

The engines of a Mixture-of-Experts model run in lock step: each step lasts as long as the slowest
engine's. Engine e takes at most R_e = token budget - decoding requests prefill tokens per step,
and a step that carries m prefill tokens on its fullest engine lasts

    base + c * m

with base (a step without prefill) and c (microseconds per prefill token) learned online. Let W_e
be the prefill tokens queued or running on e, acknowledged or not, u_e the tokens of this prompt e
has not cached, and W the largest W_e. A queue is full chunks and then a remainder, so the fullest
engine of each of the next k steps carries W tokens in all, or k full chunks if that is less. If
the request goes to e, its last chunk runs in step k_e = ceil((W_e + u_e) / R_e), and the time to
its first token is

    k_e * base + c * min(k_e * R_e, max(W, W_e + u_e))

It is split for the metrics into

    queue     (c + base / R_e) * W_e: the work before it
    prefill   c * u_e + base * (k_e - W_e / R_e): its own
    lockstep  what the fuller chunks of other engines add to the same k_e steps

What it costs others, each microsecond of delay of each request counting the same:

    interference  c * max(0, W_e + u_e - W) * decoding requests of all engines: prefill beyond the
                  longest queue lengthens steps that every engine's decodes wait for; prefill in
                  the shadow of another engine's costs them nothing.
    followers     (c + base / R_e) * u_e * requests waiting on e: by Little's law about as many as
                  wait now will arrive behind this one before it is through, and each waits for
                  its work. A long prompt therefore avoids the engine where many short ones wait.

And what it meets afterwards:

    decode     expected output tokens * d * n_e, d being what one decoding request adds to a step
               and n_e the requests that decode or will decode on e, counted by head or by context
               in units of the group's mean, whichever is more
    admission  KV tokens or request slots it lacks on e, turned over at the rate at which e
               prefills: what does not fit waits until as much has left
    expert     feedback weight * predicted straggling of e's expert-parallel ranks * k_e

Before the first steps have been measured, base is 0 and c is 1: the order is then by tokens.

Source: the shape of the cost (pressure of queue, KV and experts in one score) is the Gimbal
paper's, arXiv 2606.15177; the lock-step envelope and the pricing in time are this project's.
`followers` with `queue` and `prefill` reproduces LMetric's (new + active) * requests up to the
base time.
"""

from __future__ import annotations

import numpy as np

from gimbal.core.contracts import DispatchRequest, EngineLoads, Field, FloatArray

_TERMS = (
    "queue",
    "prefill",
    "lockstep",
    "interference",
    "followers",
    "decode",
    "admission",
    "expert",
)


class GimbalPolicy:
    """Predicted time to first token plus the delay caused to others.

    Args:
        feedback_weight: multiplier of expert pressure.
        expected_output_tokens: decode steps a request is priced for.
        session_patience: multiplier of what a session may cost to stay where it was.
    """

    term_names = _TERMS

    def __init__(
        self,
        feedback_weight: float = 0.0,
        expected_output_tokens: float = 57.0,
        session_patience: float = 1.0,
    ) -> None:
        self._feedback_weight = feedback_weight
        self._output_tokens = expected_output_tokens
        self._patience = session_patience

    def costs(self, request: DispatchRequest, loads: EngineLoads) -> FloatArray:
        """[engines] microseconds."""
        total: FloatArray = self.terms(request, loads).sum(axis=0)
        return total

    def terms(self, request: DispatchRequest, loads: EngineLoads) -> FloatArray:
        """[terms, engines] microseconds, rows named by `term_names`."""
        columns = loads.board.T
        base_us, token_us, decode_us = _speeds(columns)
        waiting = columns[Field.WAITING_REQUESTS] + loads.unacked_requests
        decoding = columns[Field.DECODING_REQUESTS]
        room = _prefill_room(columns, decoding)
        backlog = (
            columns[Field.WAITING_PREFILL_TOKENS]
            + columns[Field.RUNNING_PREFILL_TOKENS]
            + loads.unacked_tokens
        )
        uncached = request.prompt_tokens - loads.cached_tokens
        work = backlog + uncached
        steps = np.ceil(work / room)
        longest = backlog.max()
        envelope = np.maximum(longest, work)
        slice_us = token_us + base_us / room

        terms = np.empty((len(_TERMS), len(room)))
        np.multiply(slice_us, backlog, out=terms[0])
        np.subtract(steps * base_us + token_us * work, terms[0], out=terms[1])
        np.multiply(np.minimum(steps * room, envelope) - work, token_us, out=terms[2])
        np.multiply(envelope - longest, token_us * decoding.sum(), out=terms[3])
        np.multiply(slice_us * uncached, waiting, out=terms[4])
        terms[5] = self._decode(columns, waiting, decode_us)
        terms[6] = _admission(request, columns, loads, waiting, slice_us)
        if self._feedback_weight:
            np.multiply(columns[Field.EXPERT_PRESSURE_US], steps, out=terms[7])
            terms[7] *= self._feedback_weight
        else:
            terms[7] = 0.0
        return terms

    def session_bound_us(self, request: DispatchRequest, loads: EngineLoads, engine: int) -> float:
        """What prefilling the rest of the prompt costs: the most a longer hit there can save.

        The prefix index holds prompts only; the answers of earlier turns, which are part of this
        prompt, are cached on the session's engine without the index knowing.
        """
        base_us, token_us, _ = _speeds(loads.board.T)
        budget = max(1.0, float(loads.board[engine, Field.STEP_TOKEN_BUDGET]))
        unknown = request.prompt_tokens - float(loads.cached_tokens[engine])
        return self._patience * (token_us + base_us / budget) * unknown

    def _decode(self, columns: FloatArray, waiting: FloatArray, decode_us: float) -> FloatArray:
        requests = columns[Field.RUNNING_REQUESTS]
        context = columns[Field.RUNNING_TOKENS]
        mean_context = context.sum() / max(1.0, requests.sum())
        heads = np.maximum(requests, context / max(1.0, mean_context))
        load: FloatArray = (heads + waiting) * (self._output_tokens * decode_us)
        return load


def _speeds(columns: FloatArray) -> tuple[float, float, float]:
    """Step base, prefill token and decode request in us: the slowest engine sets the pace."""
    base_us = float(columns[Field.STEP_BASE_US].max())
    token_us = float(columns[Field.PREFILL_US_PER_TOKEN].max())
    if token_us <= 0.0:
        return 0.0, 1.0, 1.0
    decode_us = float(columns[Field.DECODE_US_PER_REQUEST].max())
    # A decoding request is at least one token of the step.
    return base_us, token_us, max(decode_us, token_us)


def _prefill_room(columns: FloatArray, decoding: FloatArray) -> FloatArray:
    """[engines] prefill tokens that fit into a step; unknown budgets count as vLLM's 2048."""
    budget = columns[Field.STEP_TOKEN_BUDGET]
    if not budget.all():
        budget = np.where(budget > 0, budget, 2048.0)
    room: FloatArray = np.maximum(budget - decoding, 1.0)
    return room


def _admission(
    request: DispatchRequest,
    columns: FloatArray,
    loads: EngineLoads,
    waiting: FloatArray,
    slice_us: FloatArray,
) -> FloatArray | float:
    """[engines] us until KV memory and a request slot are free for it; 0.0 if they are now."""
    block = columns[Field.KV_BLOCK_TOKENS]
    total = columns[Field.KV_BLOCKS_TOTAL] * block
    wanted = (
        columns[Field.KV_BLOCKS_USED] * block
        + columns[Field.WAITING_PREFILL_TOKENS]
        + loads.unacked_tokens
        + request.prompt_tokens
    )
    running = columns[Field.RUNNING_REQUESTS]
    slots = columns[Field.MAX_RUNNING_REQUESTS]
    excess = running + waiting + 1.0 - slots
    lacking_kv, lacking_slots = wanted - total, excess
    if lacking_kv.max() <= 0.0 and lacking_slots.max() <= 0.0:
        return 0.0
    mean_tokens = columns[Field.RUNNING_TOKENS] / np.maximum(running, 1.0)
    tokens = np.maximum(
        np.where(total > 0, lacking_kv, 0.0),
        np.where(slots > 0, lacking_slots, 0.0) * mean_tokens,
    )
    rate = columns[Field.PREFILL_TOKENS_PER_S]
    us_per_token = np.where(rate > 0, 1e6 / np.maximum(rate, 1e-9), slice_us)
    lack: FloatArray = np.maximum(tokens, 0.0) * us_per_token
    return lack
