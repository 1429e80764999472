"""How one step's token budget is spent on prefill: by whom, and how much in all.

`share_prefill_budget` serves running prefills and waiting requests in one order, that of their
keys: a long running prompt leaves the budget to shorter newcomers, and because the keys are those
of the ordering, what it can lose is bounded by the ordering's own theorem.
`protected_prefill_tokens` bounds how much prefill rides along with decodes, by the backlog of the
whole lock-step group: its engines wait for the slowest, so they had better stall together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PrefillCandidate:
    """A prompt that could use budget now: its key in the ordering, and the tokens it lacks."""

    key: float
    tokens: int


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
    return shares


@dataclass(frozen=True, slots=True)
class StepCost:
    """Learned cost of a step: its time without prefill, and what one prefill token adds."""

    base_us: float
    prefill_us_per_token: float


def protected_prefill_tokens(
    cost: StepCost,
    budget_tokens: int,
    decoding: int,
    backlog_tokens: int,
    *,
    tpot_factor: float,
    patience_steps: float,
    min_tokens: int,
) -> int:
    """Prefill tokens a step may carry beside `decoding` requests.

    Two allowances, the larger counts: what keeps the step within `tpot_factor` times a decode-only
    step, ``(factor - 1) * base / c``; and what clears the backlog within `patience_steps` steps, so
    that a burst is not held back in order to protect few decodes from it.

    Args:
        cost: of this engine's steps.
        budget_tokens: what decodes leave of the step's token budget.
        decoding: requests that decode in this step.
        backlog_tokens: prefill that waits or runs, on the engine of the lock-step group that has
            most: engines that wait for each other choose the same bound and stall together, and
            less here would not make the step shorter.
        tpot_factor, patience_steps: see above; at least 1 and above 0.
        min_tokens: never fewer.

    Returns:
        From 1 to `budget_tokens`; all of it when nothing decodes or no cost is known yet.
    """
    if decoding == 0 or cost.base_us <= 0.0 or cost.prefill_us_per_token <= 0.0:
        return budget_tokens
    within_factor = (tpot_factor - 1.0) * cost.base_us / cost.prefill_us_per_token
    allowed = max(within_factor, backlog_tokens / patience_steps, min_tokens, 1)
    return int(min(allowed, budget_tokens))
