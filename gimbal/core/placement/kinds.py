"""Planning for two kinds of step at once: those with prefill and those that only decode.

Prefill comes in few large steps, bound by token-expert pairs, between many small ones that are
bound by the distinct experts they read. The mean of both never runs, and what saves time in one
kind may save none in the other. A window is taken for steps of two sizes that have its mean and
its second moment: small ones with the decodes of a step, large ones of the size that the average
token is in. Each kind is planned for, and each layer keeps what the weighted sum prefers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from gimbal.core.contracts import FloatArray, IntArray, RoutingCounts
from gimbal.core.placement import heuristic, objective
from gimbal.core.placement.objective import CostTerms
from gimbal.core.placement.problem import PlacementProblem

ALIKE = 0.8
"""From this typical share on all steps count as one kind."""


@dataclass(frozen=True, slots=True)
class StepKind:
    """Attributes:
    share: of the window's steps.
    size: tokens of such a step over those of the mean step.
    """

    share: float
    size: float


MEAN_STEP = (StepKind(1.0, 1.0),)


def typical_share(tokens: float, squares: float, steps: float) -> float:
    """Mean step over the step that the average token is in: in (0, 1], 1 when all are alike.

    Args:
        tokens, squares: sums over the window's steps of their tokens, and of these squared.
        steps: of the window.
    """
    if not (tokens > 0.0 and squares > 0.0 and steps > 0.0):
        return 1.0
    return float(np.clip(tokens**2 / squares / steps, 1.0 / max(steps, 1.0), 1.0))


def step_kinds(typical: float, decode_share: float) -> tuple[StepKind, ...]:
    """Large steps first; one kind where steps are alike or nothing but decodes was seen.

    Args:
        typical: see `typical_share`.
        decode_share: of the window's tokens.
    """
    if typical >= ALIKE or decode_share >= 1.0:
        return MEAN_STEP
    large = 1.0 / typical
    share = (1.0 - decode_share) / (large - decode_share)
    kinds = (StepKind(share, large), StepKind(1.0 - share, decode_share))
    return tuple(kind for kind in kinds if kind.size > 0.0)


def at_kind(routing: RoutingCounts, kind: StepKind) -> RoutingCounts:
    """The window as if all its tokens came in steps of one kind.

    A step of n times the tokens leaves an expert idle if n mean ones do: ``(1 - active)^n``.
    """
    active = routing.active
    if active is not None:
        active = np.asarray(1.0 - (1.0 - active) ** kind.size)
    return RoutingCounts(routing.counts, active, max(1, round(routing.steps / kind.size)))


def mixed(
    problems: Sequence[PlacementProblem],
    kinds: Sequence[StepKind],
    candidates: Sequence[IntArray],
    keep: bool = True,
) -> heuristic.PlacementPlan:
    """The best of `candidates` in each layer, priced over all kinds; us per step of the window.

    Args:
        problems: one per kind, the horizon in steps of that kind.
        candidates: [layers, slots] each.
        keep: the placement in force is a candidate too, where it meets the constraints.
    """
    current = problems[0].current
    before = _layer_costs(problems, kinds, current)
    best, after = current, before.copy()
    worth = (1.0 - heuristic.MIN_GAIN) * before.sum(axis=0)  # less is sampling noise, no gain
    total = np.where(heuristic.usable(problems[0]) & keep, worth, np.inf)
    for candidate in candidates:
        costs = _layer_costs(problems, kinds, candidate)
        better = costs.sum(axis=0) < total
        best = np.where(better[:, None], candidate, best).astype(np.int32)
        after, total = np.where(better, costs, after), np.where(better, costs.sum(axis=0), total)
    plan = heuristic.price(problems[0], best)
    return replace(
        plan,
        before=CostTerms(*map(float, before.sum(axis=1))),
        after=CostTerms(*map(float, after.sum(axis=1))),
        layer_gain_us=before.sum(axis=0) - after.sum(axis=0),
        lower_bound_us=0.0,
    )


def _layer_costs(
    problems: Sequence[PlacementProblem], kinds: Sequence[StepKind], placement: IntArray
) -> FloatArray:
    """[3, layers] load, communication and migration per step of the window."""
    total = np.zeros((3, problems[0].layers))
    for number, (problem, kind) in enumerate(zip(problems, kinds, strict=True)):
        terms = objective.layer_costs(problem, objective.prices(problem), placement)
        total[:2] += kind.share * np.stack(terms[:2])
        if number == 0:  # the same bytes over the same steps, whichever kind asks
            total[2] = kind.share * terms[2]
    return total
