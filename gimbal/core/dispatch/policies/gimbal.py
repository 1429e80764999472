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

    reuse         prefix reuse * c * u_e * (1 + decoding requests of all engines): what is computed
                  here takes the place of something cached on e, which is asked for again with
                  about the probability that a prompt token is cached anywhere (measured), and is
                  then computed again while everybody's decodes wait. Without this term a busy
                  moment copies a shared prefix to every engine, and the copies evict each other.

And what it meets afterwards:

    decode     expected output tokens * d * n_e, d being what one decoding request adds to a step
               and n_e the requests that decode or will decode on e: the mean of their number and
               of their context in units of the group's mean request, since the learned d does not
               tell the cost per request from the cost per context token
    admission  KV tokens or request slots it lacks on e, turned over at the rate at which e
               prefills: what does not fit waits until as much has left
    expert     feedback weight * what e's experts cost above the engine they cost least * k_e

R_e is a shared R, the mean over engines, where only base / R is needed. Before the first steps
have been measured, base is 0 and c is 1: the order is then by tokens.

Each engine's quantities are one column and each term's prices one row, so that a decision is two
small matrix products instead of forty array operations.

Source: the shape of the cost (pressure of queue, KV and experts in one score) is the Gimbal
paper's, arXiv 2606.15177; the lock-step envelope and the pricing in time are this project's.
`queue`, `prefill` and `followers` together are LMetric's (new + active) * requests, in time, with
waiting requests for all requests.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from gimbal.core.contracts import DispatchRequest, EngineLoads, Field, FloatArray

_TERMS = (
    "queue",
    "prefill",
    "lockstep",
    "interference",
    "followers",
    "reuse",
    "decode",
    "expert",
    "admission",
)
_QUEUE, _PREFILL, _LOCKSTEP, _INTERFERENCE, _FOLLOWERS, _REUSE, _DECODE, _EXPERT, _ADMISSION = (
    range(len(_TERMS))
)

# Rows of an engine's quantities. The first are linear in the snapshot.
_KV_EXCESS, _BACKLOG, _WAITING, _HEADS, _SLOT_EXCESS, _ROOM, _DECODING, _RUNNING, _CONTEXT = range(
    9
)
_LINEAR_ROWS = 9
_UNCACHED, _STEPS, _BOUNDED, _BEYOND, _FOLLOWED, _PRESSED = range(_LINEAR_ROWS, 15)
_ROWS = 15

_FIRST, _LAST = int(Field.WAITING_REQUESTS), int(Field.MAX_RUNNING_REQUESTS)
_LINEAR = (
    (_KV_EXCESS, Field.WAITING_PREFILL_TOKENS, 1.0),
    (_BACKLOG, Field.WAITING_PREFILL_TOKENS, 1.0),
    (_BACKLOG, Field.RUNNING_PREFILL_TOKENS, 1.0),
    (_WAITING, Field.WAITING_REQUESTS, 1.0),
    (_HEADS, Field.WAITING_REQUESTS, 1.0),
    (_HEADS, Field.RUNNING_REQUESTS, 1.0),
    (_SLOT_EXCESS, Field.WAITING_REQUESTS, 1.0),
    (_SLOT_EXCESS, Field.RUNNING_REQUESTS, 1.0),
    (_SLOT_EXCESS, Field.MAX_RUNNING_REQUESTS, -1.0),
    (_ROOM, Field.STEP_TOKEN_BUDGET, 1.0),
    (_ROOM, Field.DECODING_REQUESTS, -1.0),
    (_DECODING, Field.DECODING_REQUESTS, 1.0),
    (_RUNNING, Field.RUNNING_REQUESTS, 1.0),
    (_CONTEXT, Field.RUNNING_TOKENS, 1.0),
)
# Plain integers: an IntEnum member as an index costs as much as the arithmetic on the column.
_KV_USED, _KV_TOTAL, _KV_BLOCK = (
    int(f) for f in (Field.KV_BLOCKS_USED, Field.KV_BLOCKS_TOTAL, Field.KV_BLOCK_TOKENS)
)
_BUDGET, _PRESSURE = int(Field.STEP_TOKEN_BUDGET), int(Field.EXPERT_PRESSURE_US)
_STEP_BASE, _TOKEN, _DECODE_SLOPE = (
    int(f) for f in (Field.STEP_BASE_US, Field.PREFILL_US_PER_TOKEN, Field.DECODE_US_PER_REQUEST)
)
_UNKNOWN_BUDGET = 2048.0  # vLLM's default, until an engine has published its own


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
        quantities = _quantities(request, loads)
        columns = loads.board.T
        prices = self._prices(quantities, _speeds(columns), loads.prefix_reuse)
        terms: FloatArray = prices.dot(quantities)
        if _lacks(quantities, request.prompt_tokens):
            slice_us = prices[_QUEUE, _BACKLOG]
            terms[_ADMISSION] = _admission(request, columns, quantities, slice_us)
        return terms

    def session_bound_us(self, request: DispatchRequest, loads: EngineLoads, engine: int) -> float:
        """What prefilling the rest of the prompt costs: the most a longer hit there can save.

        The prefix index holds prompts only; the answers of earlier turns, which are part of this
        prompt, are cached on the session's engine without the index knowing.
        """
        base_us, token_us, _ = _speeds(loads.board.T)
        budget = float(loads.board[engine, Field.STEP_TOKEN_BUDGET]) or _UNKNOWN_BUDGET
        unknown = request.prompt_tokens - float(loads.cached_tokens[engine])
        return self._patience * (token_us + base_us / budget) * unknown

    def _prices(
        self, quantities: FloatArray, speeds: tuple[float, float, float], prefix_reuse: float
    ) -> FloatArray:
        """[terms, quantities] microseconds per unit."""
        base_us, token_us, decode_us = speeds
        sums = np.add.reduce(quantities[_ROOM:_UNCACHED], axis=1).tolist()
        room, decoding, running, context = sums
        slice_us = token_us + base_us * quantities.shape[1] / room
        decode_us *= 0.5 * self._output_tokens
        stall_us = token_us * decoding

        prices = np.zeros((len(_TERMS), _ROWS))
        prices[_QUEUE, _BACKLOG] = slice_us
        prices[_PREFILL, _STEPS] = base_us
        prices[_PREFILL, _UNCACHED] = token_us
        prices[_PREFILL, _BACKLOG] = token_us - slice_us
        prices[_LOCKSTEP, _BOUNDED] = token_us
        prices[_LOCKSTEP, _BACKLOG] = prices[_LOCKSTEP, _UNCACHED] = -token_us
        prices[_INTERFERENCE, _BEYOND] = stall_us
        prices[_FOLLOWERS, _FOLLOWED] = slice_us
        prices[_REUSE, _UNCACHED] = prefix_reuse * (token_us + stall_us)
        prices[_DECODE, _HEADS] = decode_us
        prices[_DECODE, _CONTEXT] = decode_us * running / max(1.0, context)
        prices[_EXPERT, _PRESSED] = self._feedback_weight
        return prices


@lru_cache(maxsize=8)
def _linear_map(block_tokens: float) -> FloatArray:
    """[linear quantities, snapshot columns]; KV blocks of one server all have one size."""
    matrix = np.zeros((_LINEAR_ROWS, _LAST - _FIRST + 1))
    for row, column, factor in _LINEAR:
        matrix[row, column - _FIRST] = factor
    matrix[_KV_EXCESS, _KV_USED - _FIRST] = block_tokens
    matrix[_KV_EXCESS, _KV_TOTAL - _FIRST] = -block_tokens
    return matrix


def _quantities(request: DispatchRequest, loads: EngineLoads) -> FloatArray:
    """[quantities, engines]: what the terms are priced on."""
    columns = loads.board.T
    out = np.empty((_ROWS, columns.shape[1]))
    linear_map = _linear_map(float(columns[_KV_BLOCK, 0]))
    np.dot(linear_map, columns[_FIRST : _LAST + 1], out=out[:_LINEAR_ROWS])
    # Row views and `out=`: `rows[i] += x` would copy the row back onto itself.
    tokens, requests = out[_KV_EXCESS : _BACKLOG + 1], out[_WAITING : _SLOT_EXCESS + 1]
    np.add(tokens, loads.unacked_tokens, out=tokens)
    np.add(requests, loads.unacked_requests, out=requests)
    backlog, room = out[_BACKLOG], out[_ROOM]
    np.subtract(backlog, loads.unacked_cached_tokens, out=backlog)
    uncached, steps, bounded, beyond, followed, pressed = out[_LINEAR_ROWS:]

    if room[room.argmin()] <= 0.0:
        np.maximum(room, 1.0, out=room)
        room[columns[_BUDGET] == 0] = _UNKNOWN_BUDGET
    np.subtract(request.prompt_tokens, loads.cached_tokens, out=uncached)
    work = backlog + uncached
    np.ceil(np.divide(work, room, out=steps), out=steps)
    longest = backlog[backlog.argmax()]
    np.maximum(work, longest, out=beyond)
    np.minimum(np.multiply(steps, room, out=bounded), beyond, out=bounded)
    np.subtract(beyond, longest, out=beyond)
    np.multiply(uncached, out[_WAITING], out=followed)
    pressure = columns[_PRESSURE]
    # What all engines are pressed by alike cannot be avoided by choosing another one.
    np.multiply(np.subtract(pressure, pressure[pressure.argmin()], out=pressed), steps, out=pressed)
    return out


def _speeds(columns: FloatArray) -> tuple[float, float, float]:
    """Step base, prefill token and decode request in us: the slowest engine sets the pace."""
    base, token, decode = columns[_STEP_BASE], columns[_TOKEN], columns[_DECODE_SLOPE]
    token_us = float(token[token.argmax()])
    if token_us <= 0.0:
        return 0.0, 1.0, 1.0
    # A decoding request is at least one token of the step.
    return float(base[base.argmax()]), token_us, max(float(decode[decode.argmax()]), token_us)


def _lacks(quantities: FloatArray, prompt_tokens: int) -> bool:
    """Whether any engine has no room for the request now."""
    kv, slots = quantities[_KV_EXCESS], quantities[_SLOT_EXCESS]
    fits: bool = kv[kv.argmax()] + prompt_tokens <= 0.0 and slots[slots.argmax()] + 1.0 <= 0.0
    return not fits


def _admission(
    request: DispatchRequest, columns: FloatArray, quantities: FloatArray, slice_us: float
) -> FloatArray:
    """[engines] us until KV memory and a request slot are free for the request."""
    kv = quantities[_KV_EXCESS] + request.prompt_tokens
    slots = quantities[_SLOT_EXCESS] + 1.0
    mean_tokens = quantities[_CONTEXT] / np.maximum(quantities[_RUNNING], 1.0)
    tokens = np.maximum(
        np.where(columns[Field.KV_BLOCKS_TOTAL] > 0, kv, 0.0),
        np.where(columns[Field.MAX_RUNNING_REQUESTS] > 0, slots, 0.0) * mean_tokens,
    )
    rate = columns[Field.PREFILL_TOKENS_PER_S]
    us_per_token = np.where(rate > 0, 1e6 / np.maximum(rate, 1e-9), slice_us)
    lack: FloatArray = np.maximum(tokens, 0.0) * us_per_token
    return lack
