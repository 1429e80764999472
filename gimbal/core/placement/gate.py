"""Is a rearrangement worth its stall? Pure: a plan and a horizon in, a decision out."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from gimbal.core.placement.heuristic import PlacementPlan

LEAST_GAIN_US_PER_STEP = 1e-9
"""Less is rounding: costs are differences of sums of microseconds."""


NO_NUMBER = "its gain or stall is not a finite number"


@dataclass(frozen=True, slots=True)
class GateDecision:
    """Attributes:
    commit: True when the predicted gain over the horizon exceeds the predicted stall.
    gain_us_per_step: load and communication saved per step.
    gain_us: the same over the horizon.
    stall_us: predicted time the migration takes from serving.
    reason: one clause for records and logs.
    """

    commit: bool
    gain_us_per_step: float
    gain_us: float
    stall_us: float
    reason: str


def ungated(decision: GateDecision, moved_slots: int) -> GateDecision:
    """`decision` of a placer that declares ``gated = False``: whatever moves is committed.

    Unless nobody can say what it does: a gain that is not a number is refused here as well.
    """
    if decision.reason == NO_NUMBER:
        return decision
    return replace(decision, commit=moved_slots > 0, reason=f"not gated: {decision.reason}")


def decide(
    plan: PlacementPlan,
    horizon_steps: int,
    gamma: float = 1.0,
    safety: float = 1.0,
    stall_us: float | None = None,
) -> GateDecision:
    """Commits `plan` only if ``gain > safety * stall`` over `horizon_steps`, both finite.

    Args:
        plan: its migration term is the stall amortized over the horizon it was planned with.
        horizon_steps: steps until the next chance to rearrange, the one the plan was made for.
        gamma: multiplier the plan's migration term already contains; the stall is without it.
        safety: 1 is break-even; 0 commits any gain, as vLLM's default does without its gate.
        stall_us: a measured stall, which wins against the predicted one.
    """
    per_step = plan.before.load + plan.before.comm - plan.after.load - plan.after.comm
    gain_us = per_step * horizon_steps
    predicted_us = plan.after.migration * horizon_steps / gamma if gamma > 0 else 0.0
    stall_us = predicted_us if stall_us is None else stall_us
    if plan.moved_slots == 0:
        return GateDecision(False, 0.0, 0.0, 0.0, "nothing to move")
    numbers = (gain_us, predicted_us, safety * stall_us)
    if not all(map(math.isfinite, numbers)) or min(predicted_us, stall_us) < 0.0:
        return GateDecision(False, 0.0, 0.0, 0.0, NO_NUMBER)
    commit = gain_us > safety * stall_us and per_step > LEAST_GAIN_US_PER_STEP
    sign = "exceeds" if commit else "does not exceed"
    reason = f"gain {gain_us:.0f} us {sign} {safety:g} x stall {stall_us:.0f} us"
    return GateDecision(commit, per_step, gain_us, stall_us, reason)
