"""How one step's token budget is spent on prefill: by whom, and how much in all.

`share_prefill_budget` serves running prefills and waiting requests in one order, that of their
keys: a long running prompt leaves the budget to shorter newcomers, and because the keys are those
of the ordering, what it can lose is bounded by the ordering's own theorem.
`bounded_prefill_tokens` bounds how much prefill rides along with decodes, by the backlog of the
whole lock-step group: its engines wait for the slowest, so they had better stall together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from gimbal.core.queue.heap import FRONT, Entry, WaitingHeap

NEWCOMERS = 16
"""Waiting requests that may claim a running prefill's budget in one step."""
HOLD_STEPS = 8
"""Steps without yielding after one in which a prefill yielded to somebody who was not admitted."""
DECODE_FACTOR = 2.5
"""How much longer than a step without prefill one with prefill may be, as far as decodes go."""
PATIENCE_STEPS = 2.0
"""Steps in which a backlog is prefilled if that needs no larger ones than `STRETCH` does."""
PATIENT_SHARE = 0.4
"""Share of the group's steps that prefill, from which on a backlog is given these steps."""
SHARE_STEPS = 64
"""Steps over which that share is smoothed."""
STRETCH = 0.125
"""How much longer a backlog's prefill may last than in steps of any size."""
TTFT_MARGIN = 0.2
"""Share of a TTFT target that is left to what no step decides: the API, a step under way."""
_CLASS_TOKENS = 1e12
"""Key distance between priority classes, and between them and who must not wait any longer."""
_INFINITY = float("inf")
_FIRST = -_CLASS_TOKENS * _CLASS_TOKENS


class PrefillCandidate(NamedTuple):
    """A prompt that could use budget now: its key in the ordering, and the tokens it could use."""

    key: float
    tokens: int


def waiting_candidate(entry: Entry[Any], strict: bool) -> PrefillCandidate:
    """The claim of a request that could be admitted in this step.

    Args:
        entry: its place in the queue.
        strict: whether a priority class always goes before the next (see `WaitingHeap`).
    """
    return PrefillCandidate(_key(entry, strict), max(1, entry.request.uncached_tokens))


def running_candidate(
    entry: Entry[Any] | None,
    heap: WaitingHeap[Any],
    now_s: float,
    left_tokens: int,
    strict: bool,
) -> PrefillCandidate:
    """The claim of a running prefill: its key less what has been computed.

    It goes before all others when it waited past the heap's limit, and when its key is of an
    ordering no longer in force and so says nothing.

    Args:
        entry: the place it had in the queue; None when it never had one.
        heap: the queue; now_s: its clock.
        left_tokens: prompt tokens it lacks.
        strict: see `waiting_candidate`.
    """
    if entry is None or entry.epoch != heap.epoch or _waited_too_long(entry, heap, now_s):
        return PrefillCandidate(_FIRST, left_tokens)
    computed = max(0, entry.request.uncached_tokens - left_tokens)
    return PrefillCandidate(_key(entry, strict) - computed, left_tokens)


def _waited_too_long(entry: Entry[Any], heap: WaitingHeap[Any], now_s: float) -> bool:
    return heap.max_wait_s is not None and now_s - entry.queued_s > heap.max_wait_s


def _key(entry: Entry[Any], strict: bool) -> float:
    """The queue's order as one number: class, preempted ones first, key."""
    key = entry.key
    if entry.lane == FRONT:
        key -= _CLASS_TOKENS / 2
    if strict:
        key += entry.request.priority * _CLASS_TOKENS
    return key


def share_prefill_budget(
    running: Sequence[PrefillCandidate],
    waiting: Sequence[PrefillCandidate],
    budget_tokens: int,
) -> list[int]:
    """Tokens each running prefill may have in this step, when it yields to smaller keys.

    Args:
        running: prefills under way.
        waiting: the next waiting requests that could be admitted in this step; ties in key go to
            the running one.
        budget_tokens: what decodes leave of the step's token budget.

    Returns:
        One number per running prefill, from 0 (it pauses for this step) to its ``tokens``.
    """
    shares = [0] * len(running)
    order = [(c.key, 0, index, c.tokens) for index, c in enumerate(running)]
    order += [(c.key, 1, index, c.tokens) for index, c in enumerate(waiting)]
    order.sort()
    left = max(0, budget_tokens)
    for _, is_waiting, index, tokens in order:
        grant = min(left, tokens)
        left -= grant
        if not is_waiting:
            shares[index] = grant
        if left == 0:
            break
    return shares


class PrefillSharing:
    """After yielding in vain nobody yields for a while: a prefill is never paused for nobody."""

    def __init__(self) -> None:
        self._hold_until = 0

    def may_yield(self, step: int) -> bool:
        """Whether newcomers may claim anything in `step`."""
        return step >= self._hold_until

    def in_vain(self, step: int) -> None:
        """In `step` a prefill yielded, and tokens were left over while somebody waited."""
        self._hold_until = step + HOLD_STEPS


@dataclass(frozen=True, slots=True)
class StepCost:
    """Learned cost of a step.

    Attributes:
        base_us: its time without prefill.
        prefill_us_per_token: what a prefill token adds on the mean of the latest steps, with what
            other engines prefill beside it.
        next_us_per_token: what a token of the next prompt adds, at its depth; 0 while unknown.
    """

    base_us: float
    prefill_us_per_token: float
    next_us_per_token: float = 0.0


def smoothed_share(share: float, prefills: bool) -> float:
    """Share of the latest steps in which an engine of the group prefilled, one step later."""
    return share + (prefills - share) / SHARE_STEPS


def bounded_prefill_tokens(
    cost: StepCost,
    budget_tokens: int,
    backlog_tokens: float,
    *,
    waited_us: float = 0.0,
    ttft_us: float = 0.0,
    tpot_us: float = 0.0,
    min_tokens: int = 1,
    prefill_share: float = 1.0,
) -> int:
    """Prefill tokens that a step may carry beside decodes.

    Two allowances, the larger counts.

    - What decodes bear: `DECODE_FACTOR` times a step without prefill, and no more than `tpot_us`.
      Tokens count at the larger of both costs: in a burst, when all engines prefill, a token takes
      longer than its depth says.
    - What prompts need: the least size that prefills a backlog of B tokens in time. Steps of s
      tokens take ``B * (base / s + c)``, so that within T it is ``B * base / (T - c * B)``, T being
      what `waited_us` leaves of `ttft_us`, less `TTFT_MARGIN`. Without that target it is
      ``B / PATIENCE_STEPS``: a burst is cleared in large steps, not held back to protect few
      decodes. Below `PATIENT_SHARE` it is all of B. Two steps spare decodes something only where
      other engines prefill at the same time, beside which they stall anyway; alone, a backlog in
      two steps is just done a step without prefill later. But steps of ``base / (STRETCH * c)``
      are large enough whatever B: the whole of it then takes ``1 + STRETCH`` times ``c * B``, and
      larger ones stall decodes for little.

    Where a step costs the same per token whatever its size, no size saves decodes anything, and the
    factor only keeps one step from stalling them for long.

    Args:
        cost: of the group's steps, and of this engine's next prompt at its depth.
        budget_tokens: what decodes leave of the step's token budget.
        backlog_tokens: prefill that waits or runs, on the engine of the lock-step group that has
            most: engines that wait for each other choose the same bound and stall together, and
            less here would not make the step shorter.
        waited_us: how long the oldest prompt of this engine without a token has waited.
        ttft_us, tpot_us: targets; 0 is none.
        min_tokens: never fewer; at least 1.
        prefill_share: see `smoothed_share`.

    Returns:
        From 1 to `budget_tokens`; all of it while no cost is known.
    """
    base_us, token_us = cost.base_us, cost.prefill_us_per_token
    if base_us <= 0.0 or token_us <= 0.0:
        return budget_tokens
    next_us = cost.next_us_per_token or token_us
    bearable_us = min(DECODE_FACTOR * base_us, tpot_us or _INFINITY)
    allowed = max((bearable_us - base_us) / max(token_us, next_us), min_tokens)
    if ttft_us > 0.0:
        left_us = (1.0 - TTFT_MARGIN) * ttft_us - waited_us - next_us * backlog_tokens
        needed = backlog_tokens * base_us / left_us if left_us > 0.0 else budget_tokens
    else:
        patience = PATIENCE_STEPS if prefill_share >= PATIENT_SHARE else 1.0
        needed = min(backlog_tokens / patience, base_us / STRETCH / next_us)
    return int(min(max(allowed, needed), budget_tokens))
