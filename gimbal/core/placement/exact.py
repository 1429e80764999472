"""Optimal placements of small instances, offline: what the heuristic's gap is measured against.

One layer at a time (layers only meet in a move budget, which is left out). The linear form of the
MoE time replaces the curve, as in the search; where it matters the report compares both solutions
under it. The solver is HiGHS (the extra ``exact``), as a mixed-integer linear program.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from importlib import util
from typing import Any

import numpy as np

from gimbal.core.contracts import FloatArray, IntArray
from gimbal.core.errors import InputError
from gimbal.core.interrupts import deferred
from gimbal.core.placement import objective
from gimbal.core.placement.bounds import send_costs
from gimbal.core.placement.problem import PlacementProblem

THREADS = 2
RELATIVE_GAP = 1e-5
"""A layer is solved when its bound is this near its best placement."""
_LOOK_S = 0.1
"""How often a solve looks whether it is to end."""


@dataclass(frozen=True, slots=True)
class ExactInstance:
    """One layer, microseconds per step.

    Attributes:
        load: [copies - 1][expert] time of one of that many replicas, alpha included.
        send: [expert][rank] cost of sending all pairs of the expert to the rank.
        receive: [expert][rank] cost of the weights' arrival, 0 where they are already.
        slots: slots per rank.
        most_copies: replicas an expert may have.
        hint: [expert][rank] 0/1, a valid solution to start from.
    """

    load: FloatArray
    send: FloatArray
    receive: FloatArray
    slots: int
    most_copies: int
    hint: IntArray

    @property
    def experts(self) -> int:
        return len(self.send)

    @property
    def ranks(self) -> int:
        return int(self.send.shape[1])


@dataclass(frozen=True, slots=True)
class ExactResult:
    """Attributes:
    cost: objective of the best placement found; bound: proven lower bound of it.
    holds: [expert][rank] 0/1 that placement.
    """

    cost: float
    bound: float
    holds: IntArray
    seconds: float


@dataclass(frozen=True, slots=True)
class ExactReport:
    """Sums over layers. `gap` is the heuristic's cost over the best known, minus one.

    `proven_gap` is the same against the solver's lower bound: an upper bound of the true gap,
    infinite where the solver had no time to prove anything.
    """

    heuristic_us: float
    exact_us: float
    bound_us: float
    layers: int
    optimal_layers: int
    seconds: float

    @property
    def gap(self) -> float:
        return _gap(self.heuristic_us, self.exact_us)

    @property
    def proven_gap(self) -> float:
        return _gap(self.heuristic_us, self.bound_us)

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "gap": self.gap, "proven_gap": self.proven_gap}


def _gap(cost_us: float, least_us: float) -> float:
    if least_us > 0.0:
        return cost_us / least_us - 1.0
    return float("inf") if cost_us > 0.0 else 0.0


def matrix(placement: IntArray, ranks: int, experts: int) -> IntArray:
    """[experts, ranks] 1 where a rank holds an expert; `placement` is one layer's [slots]."""
    holds = np.zeros((experts, ranks), dtype=np.int32)
    holds[placement, np.arange(len(placement)) // (len(placement) // ranks)] = 1
    return holds


def instance(
    problem: PlacementProblem, priced: objective.Prices, layer: int, hint: IntArray
) -> ExactInstance:
    """The exact model's numbers for one layer; `hint` is a valid [slots] placement."""
    t, experts = problem.topology, problem.experts
    most = min(t.ranks, 1 + t.slots - experts)
    copies = np.arange(1, most + 1)[:, None]
    active = 1.0 - (1.0 - priced.active[layer]) ** (1.0 / copies)
    load = priced.us_per_pair[layer] * priced.pairs[layer] / copies
    load = problem.alpha * (load + priced.us_per_active[layer] * active)
    receive = priced.receive_us * (1 - matrix(problem.current[layer], t.ranks, experts))
    return ExactInstance(
        load=load,
        send=send_costs(problem, priced)[layer],
        receive=np.asarray(receive, dtype=np.float64),
        slots=t.slots_per_rank,
        most_copies=most,
        hint=matrix(hint, t.ranks, experts),
    )


def cost(model: ExactInstance, holds: IntArray) -> float:
    """Objective of a placement [experts, ranks] under the exact model, without `change_us`."""
    copies = holds.sum(axis=1)
    unit = model.load[copies - 1, np.arange(len(holds))]
    slowest = float((holds * unit[:, None]).sum(axis=0).max())
    send = float((model.send * holds / copies[:, None]).sum())
    return slowest + send + float((model.receive * holds).sum())


def compare(
    problem: PlacementProblem,
    placement: IntArray,
    time_limit_s: float = 60.0,
    layers: int | None = None,
    on_layer: Callable[[int, int], None] = lambda done, total: None,
) -> ExactReport:
    """Solves the first `layers` layers exactly and prices `placement` beside them.

    Args:
        on_layer: called with (finished, all) layers.

    Raises:
        InputError: a problem with a forecast (the exact model has no uncertainty) or with expert
            groups, or HiGHS is not installed.
    """
    if problem.forecast is not None or problem.group_locked:
        raise InputError("the exact solver takes neither a forecast nor expert groups")
    if util.find_spec("highspy") is None:
        raise InputError("--exact needs highspy: pip install 'gimbal-moe[exact]'")
    priced = objective.prices(problem)
    count = min(layers or problem.layers, problem.layers)
    ours, best, bounds, seconds = [], [], [], 0.0
    for n in range(count):
        on_layer(n, count)
        model = instance(problem, priced, n, placement[n])
        result = solve(model, time_limit_s)
        seconds += result.seconds
        now, plan = (
            matrix(p[n], problem.topology.ranks, problem.experts)
            for p in (problem.current, placement)
        )
        ours.append(_with_change(model, plan, now, priced.change_us))
        # A changed layer pays its fixed cost, an unchanged one does not: the optimum is the better
        # of staying and of the best there is, which the solver finds without that cost.
        stay = cost(model, now)
        best.append(min(stay, _with_change(model, result.holds, now, priced.change_us)))
        bounds.append(min(stay, result.bound + priced.change_us))
    optimal = sum(b <= low * (1 + 1e-4) + 1e-9 for b, low in zip(best, bounds, strict=True))
    return ExactReport(
        heuristic_us=float(sum(ours)),
        exact_us=float(sum(best)),
        bound_us=float(sum(bounds)),
        layers=count,
        optimal_layers=optimal,
        seconds=seconds,
    )


def _with_change(model: ExactInstance, holds: IntArray, now: IntArray, change_us: float) -> float:
    """`cost`, and `change_us` when a rank receives an expert it does not hold `now`."""
    return cost(model, holds) + (change_us if bool((holds > now).any()) else 0.0)


def solve(model: ExactInstance, time_limit_s: float = 60.0) -> ExactResult:
    """Minimizes slowest rank + sends + receipts; see "Exact form" in docs/placement-planner.md.

    The result is the solver's placement or the hint, whichever `cost` says is better.

    Ctrl-C ends it early, and arrives at its end. An exception in the middle would be lost in a
    callback, turned into a failed import of HiGHS, or wait for the solver's thread.
    """
    with deferred() as interrupts:
        return _solve(model, time_limit_s, interrupts)


def _solve(model: ExactInstance, time_limit_s: float, interrupts: Sequence[int]) -> ExactResult:
    import highspy

    highs: Any = highspy.Highs()  # type: ignore[no-untyped-call]
    for name, value in (
        ("output_flag", False),
        ("time_limit", time_limit_s),
        ("threads", THREADS),
        ("mip_rel_gap", RELATIVE_GAP),
    ):
        highs.setOptionValue(name, value)
    experts, ranks, most = model.experts, model.ranks, model.most_copies
    x = [[highs.addBinary() for _ in range(ranks)] for _ in range(experts)]
    slowest = highs.addVariable(lb=float(model.load[0].sum() / ranks) if most == 1 else 0.0)
    rank_load: list[list[Any]] = [[] for _ in range(ranks)]
    costs = [1.0 * slowest]
    for e in range(experts):
        y = _by_copies(highs, x[e], most)
        for r in range(ranks):
            for m in range(most):
                rank_load[r].append(float(model.load[m, e]) * y[m][r])
                costs.append(float(model.send[e, r] / (m + 1) + model.receive[e, r]) * y[m][r])
    for r in range(ranks):
        highs.addConstr(highs.qsum(x[e][r] for e in range(experts)) == model.slots)
        highs.addConstr(highs.qsum(rank_load[r]) <= slowest)
    _minimize(highs, highs.qsum(costs), interrupts)
    info = highs.getInfo()
    values = highs.getSolution().col_value
    holds = model.hint
    feasible = int(highspy.SolutionStatus.kSolutionStatusFeasible)
    if values and info.primal_solution_status == feasible:
        found = np.array([[round(values[v.index]) for v in row] for row in x], dtype=np.int32)
        holds = min(found, holds, key=lambda h: cost(model, h))
    value = cost(model, holds)
    bound = min(max(0.0, float(info.mip_dual_bound)), value)  # -inf after no time; costs are >= 0
    return ExactResult(value, bound, holds, highs.getRunTime())


def _minimize(highs: Any, objective: Any, interrupts: Sequence[int]) -> None:
    """In a thread of its own: Python sees Ctrl-C only between two of its own instructions."""
    highs.HandleUserInterrupt = True
    with ThreadPoolExecutor(1) as pool:
        solving = pool.submit(highs.minimize, objective)
        while not wait([solving], _LOOK_S).done:
            if interrupts:
                highs.cancelSolve()
    solving.result()


def _by_copies(highs: Any, x: list[Any], most: int) -> list[list[Any]]:
    """[copies - 1][rank] 1 when the rank holds the expert and it has that many replicas."""
    if most == 1:
        highs.addConstr(highs.qsum(x) == 1)
        return [x]
    z = [highs.addBinary() for _ in range(most)]
    highs.addConstr(highs.qsum(z) == 1)
    highs.addConstr(highs.qsum(x) == highs.qsum((m + 1) * z[m] for m in range(most)))
    y = [[highs.addVariable(0, 1) for _ in x] for _ in range(most)]
    for r, held in enumerate(x):
        highs.addConstr(highs.qsum(y[m][r] for m in range(most)) == held)
        for m in range(most):
            highs.addConstr(y[m][r] <= z[m])
    return y
