"""Gimbal's placer: from the placement in force to a better one, in bounded deterministic work.

Per layer (`kernel.solve_layer`): replica exchange while a hot expert's replica is busier than a
cold expert's would be with one fewer; then best-improvement swaps from the hottest rank down, each
by its exact effect on smoothed load, communication and migration; then experts that stay on their
rank keep their slot. A layer is changed only if its exact cost falls, migration included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gimbal.core.contracts import FloatArray, IntArray, RoutingCounts, Topology
from gimbal.core.placement import forecast, objective
from gimbal.core.placement.bounds import load_floor_us, send_costs
from gimbal.core.placement.objective import CostTerms, Prices
from gimbal.core.placement.problem import PlacementProblem

if TYPE_CHECKING:
    from gimbal.core.placement.kinds import StepKind

VISITS_PER_SLOT = 8
"""Bound of the search: rank visits per slot and sharpness stage (far above what is needed)."""

MIN_GAIN = 0.005
"""A layer changes only if its cost falls by this share: without drift, nothing should move."""

FIRST_STAGE = 200.0
"""First sharpness times the mean rank's time: below it one stage is enough."""

PATIENCE = 8
"""A stage ends when so many ranks in a row, hottest first, cannot improve."""

MOVE_SHARE = 0.75
"""Share of a received expert's cost that the search charges: an expert that moved stays useful
beyond the window it is amortized over. Layers are still accepted, and plans gated, at full cost."""

REPLICA_MARGIN = 1.08
"""A spare slot changes experts when the hot replica would still be this much hotter."""

Terms = tuple[FloatArray, FloatArray, FloatArray]
"""[layers] load, communication and migration cost."""


@dataclass(frozen=True, slots=True)
class PlacementPlan:
    """A planned placement and what it is predicted to do; costs are microseconds per step.

    Attributes:
        physical_to_logical: [layers, slots], int32.
        before: cost of keeping the current placement.
        after: cost of the plan, amortized migration included.
        lower_bound_us: proven: no placement costs less.
        layer_gain_us: [layers] before minus after.
        balance_before, balance_planned: mean over layers of mean/max rank pairs.
        local_share_before, local_share_planned: share of pairs that stay on the source's ranks.
        received_experts: slots whose expert was not on that rank before.
        moved_slots: slots that hold another expert than before.
        slots: all layers' slots.
    """

    physical_to_logical: IntArray
    before: CostTerms
    after: CostTerms
    lower_bound_us: float
    layer_gain_us: FloatArray
    balance_before: float
    balance_planned: float
    local_share_before: float
    local_share_planned: float
    received_experts: int
    moved_slots: int
    slots: int

    @property
    def gap(self) -> float:
        """Relative distance of the plan's cost from the lower bound."""
        return (self.after.total - self.lower_bound_us) / max(self.lower_bound_us, 1e-12)


def plan(problem: PlacementProblem) -> PlacementPlan:
    """Plans a placement; never costs more than keeping the current one."""
    priced = objective.prices(problem)
    placement, facts, notes = _solve(problem, priced, _start(problem), -1)
    before, after = _terms(problem, priced, facts[:, 0]), _terms(problem, priced, facts[:, 1])
    usable_now = usable(problem) if problem.group_locked else notes[:, 1] == 0.0
    keep = (_total(before) - _total(after) <= _tolerance(before)) & usable_now
    if problem.max_received is not None:
        placement, keep = _within_budget(problem, priced, placement, before, after, keep)
        placement = np.where(keep[:, None], problem.current, placement).astype(np.int32)
        return price(problem, placement)
    placement = np.where(keep[:, None], problem.current, placement)
    facts[keep, 1] = facts[keep, 0]
    return _report(problem, priced, placement, facts, notes[:, 0])


def _terms(problem: PlacementProblem, priced: Prices, facts: FloatArray) -> Terms:
    """Costs of the placement that the kernel's `facts` [layers, 6] describe."""
    received = facts[:, 2]
    migration = priced.receive_us * received + priced.change_us * (received > 0)
    return problem.alpha * facts[:, 0], facts[:, 1], migration


def _total(terms: Terms) -> FloatArray:
    return terms[0] + terms[1] + terms[2]


def _tolerance(before: Terms) -> FloatArray:
    """[layers] gains below this are sampling noise of the counts, not gains."""
    return MIN_GAIN * _total(before)


def usable(problem: PlacementProblem) -> NDArray[np.bool_]:
    """[layers] True where the placement in force meets the constraints and may be kept.

    vLLM's own placements may hold an expert twice on a rank, and know no groups between plans.
    """
    per_rank = np.sort(problem.current.reshape(problem.layers, problem.topology.ranks, -1), axis=2)
    fine = (per_rank[:, :, 1:] != per_rank[:, :, :-1]).all(axis=(1, 2))
    if problem.group_locked:
        from gimbal.core.placement.eplb import groups_respected

        fine &= groups_respected(
            problem.current, problem.topology, problem.experts, problem.expert_groups
        )
    return np.asarray(fine)


def _start(problem: PlacementProblem) -> IntArray:
    """[layers, slots] where the search starts: the placement in force, unless groups forbid it."""
    current = np.require(problem.current, np.int32, ["C", "W"])
    if not problem.group_locked:
        return current
    from gimbal.core.placement.eplb import eplb_placement

    respected = usable(problem)
    if respected.all():
        return current
    packed = eplb_placement(
        problem.expected, problem.topology, problem.expert_groups, problem.nodes
    )
    return np.where(respected[:, None], current, packed).astype(np.int32)


def _within_budget(
    problem: PlacementProblem,
    priced: Prices,
    placement: IntArray,
    before: Terms,
    after: Terms,
    keep: NDArray[np.bool_],
) -> tuple[IntArray, NDArray[np.bool_]]:
    """Spends `max_received` on the layers that gain most per received expert.

    The first layer that no longer fits is planned again under what is left of the budget.
    """
    budget = problem.max_received or 0
    gain = _total(before) - _total(after)
    moved = objective.received(placement, problem.current, problem.topology)
    order = np.argsort(-gain / np.maximum(moved, 1), kind="stable")
    keep = keep.copy()
    rest: IntArray | None = None
    placement = placement.copy()
    for layer in order:
        if keep[layer] or moved[layer] <= budget:
            budget -= 0 if keep[layer] else int(moved[layer])
            continue
        keep[layer] = True
        if rest is None and budget > 0 and not problem.group_locked:
            rest, facts, _ = _solve(problem, priced, _start(problem), budget)
            costs, spent = _terms(problem, priced, facts[:, 1]), facts[:, 1, 2]
            if _total(costs)[layer] < _total(before)[layer] and spent[layer] <= budget:
                placement[layer] = rest[layer]
                keep[layer] = False
                budget -= int(spent[layer])
    return placement, keep


def _solve(
    problem: PlacementProblem, priced: Prices, start: IntArray, budget: int
) -> tuple[IntArray, FloatArray, FloatArray]:
    """Runs the kernel.

    Returns:
        placement [layers, slots], facts [layers, 2, 6] of the current and the new placement (see
        `kernel`), and notes [layers, 2]: the least that communication can cost, and 1 where the
        start holds an expert twice on a rank.
    """
    # numba is loaded here, not on import: servers import this package and may never plan.
    from gimbal.core.placement import kernel

    t = problem.topology
    log_idle = np.full_like(priced.active, -1e3)
    np.log1p(-priced.active, out=log_idle, where=priced.active < 1.0)
    setup = kernel.Setup(
        ranks=t.ranks,
        per_rank=t.slots_per_rank,
        ranks_per_source=t.ranks_per_source,
        ranks_per_node=t.ranks_per_node,
        node_locked=problem.group_locked,
        budget=budget,
        pairs_scale=1.0 / problem.routing.steps,
        same_rank_us=float(priced.send_us[0]),
        same_node_us=float(priced.send_us[1]),
        other_node_us=float(priced.send_us[2]),
        receive_us=float(MOVE_SHARE * priced.receive_us),
        alpha=float(problem.alpha),
        sharpness=objective.MAX_SHARPNESS,
        replica_margin=REPLICA_MARGIN,
        first_stage=FIRST_STAGE,
        visits=VISITS_PER_SLOT * t.slots,
        patience=PATIENCE,
        known_sources=len(problem.routing.counts) == t.sources,
    )
    load = kernel.Load(
        priced.pairs,
        priced.active,
        objective.round32(log_idle),
        np.ones_like(priced.pairs) if problem.forecast is None else problem.forecast.factor,
        priced.variance,
        priced.us_per_pair,
        priced.us_per_active,
        priced.theta,
        np.array([*problem.constants.moe, problem.constants.top_k], dtype=np.float64),
        problem.measured,
    )
    # The kernel is compiled for one kind of array; another would be compiled anew.
    counts = np.require(problem.routing.counts, np.float64, ["C", "W"])
    current = np.require(problem.current, np.int32, ["C", "W"])
    placement = np.empty_like(current)
    facts, notes = np.zeros((problem.layers, 2, 6)), np.zeros((problem.layers, 2))
    kernel.compiled()(counts, current, start, load, setup, placement, facts, notes)
    return placement, facts, notes


def _report(
    problem: PlacementProblem,
    priced: Prices,
    placement: IntArray,
    facts: FloatArray,
    comm_floor: FloatArray,
) -> PlacementPlan:
    """`facts` [layers, 2, 6] describe the current placement and `placement`, see `kernel`."""
    before, after = _terms(problem, priced, facts[:, 0]), _terms(problem, priced, facts[:, 1])
    _, _, received, moved, balance, local = np.moveaxis(facts, 2, 0)
    floor = load_floor_us(problem, priced) + comm_floor
    if len(problem.routing.counts) == problem.topology.sources:
        at_home = local.sum(axis=0) / max(float(problem.measured.sum()), 1e-300)
    else:  # unknown sources: traffic taken as spread evenly over them
        at_home = np.full(2, problem.topology.ranks_per_source / problem.topology.ranks)
    return PlacementPlan(
        physical_to_logical=placement,
        before=CostTerms(*(float(term.sum()) for term in before)),
        after=CostTerms(*(float(term.sum()) for term in after)),
        lower_bound_us=float(floor.sum()),
        layer_gain_us=np.asarray(_total(before) - _total(after)),
        balance_before=float(balance[:, 0].mean()),
        balance_planned=float(balance[:, 1].mean()),
        local_share_before=float(at_home[0]),
        local_share_planned=float(at_home[1]),
        received_experts=int(received[:, 1].sum()),
        moved_slots=int(moved[:, 1].sum()),
        slots=int(placement.size),
    )


def price(problem: PlacementProblem, placement: IntArray) -> PlacementPlan:
    """Another placer's `placement` [layers, slots] as a plan, priced and bounded like our own."""
    priced = objective.prices(problem)
    floor = send_costs(problem, priced).min(axis=2).sum(axis=1)
    facts = np.stack([_facts(problem, priced, p) for p in (problem.current, placement)], axis=1)
    return _report(problem, priced, placement, facts, floor)


def _facts(problem: PlacementProblem, priced: Prices, placement: IntArray) -> FloatArray:
    """[layers, 6] what the kernel says of its own placements, of any other."""
    t, counts = problem.topology, problem.routing.counts
    loads = objective.pair_loads(placement, problem.measured, t)
    worst = loads.max(axis=1)
    columns = (
        objective.load_us(problem, priced, placement),
        objective.communication_us(problem, priced, placement),
        objective.received(placement, problem.current, t),
        (placement != problem.current).sum(axis=1),
        np.where(worst > 0, loads.mean(axis=1) / np.maximum(worst, 1e-300), 1.0),
        objective.crossing_pairs(placement, counts, t)[0],
    )
    return np.stack(columns, axis=1).astype(np.float64)


class GimbalPlacer:
    """`contracts.Placer` around `plan` that plans for the next window, not for the last.

    Remembers what past windows say about the next one (`forecast`), so one object serves one
    server, and every rank must show it the same windows.

    Args:
        template: keyword arguments of `PlacementProblem` besides routing, topology and current.
    """

    def __init__(self, **template: Any) -> None:
        self._template = template
        self._state: forecast.ForecastState | None = None

    def place(self, routing: RoutingCounts, topology: Topology, current: IntArray) -> IntArray:
        problem = PlacementProblem(routing, topology, current, **self._template)
        return self.plan(problem).physical_to_logical

    def plan(self, problem: PlacementProblem) -> PlacementPlan:
        """Plans `problem` with this placer's own forecast, learning from its window first."""
        return plan(self.expecting([problem])[0])

    def plan_kinds(
        self, problems: Sequence[PlacementProblem], kinds: Sequence[StepKind]
    ) -> PlacementPlan:
        """Plans one window, given as one problem per kind (horizon in steps of that kind)."""
        from gimbal.core.placement.kinds import mixed

        expected = self.expecting(problems)
        plans = [plan(problem) for problem in expected]
        if len(plans) == 1 and kinds[0].share == 1.0:
            return plans[0]
        return mixed(expected, kinds, [each.physical_to_logical for each in plans])

    def expecting(self, problems: Sequence[PlacementProblem]) -> list[PlacementProblem]:
        """The same window's problems for the next one, after learning from it once."""
        measured = problems[0].measured
        self._state = forecast.observe(self._state, measured)
        expected = forecast.predict(self._state, measured)
        return [problem.with_forecast(expected) for problem in problems]

    def learn(self, total: FloatArray) -> None:
        """Takes in one more window: [layers, experts] pairs over all sources."""
        self._state = forecast.observe(self._state, total)
