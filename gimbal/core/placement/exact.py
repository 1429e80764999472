"""Optimal placements of small instances, offline: what the heuristic's gap is measured against.

One layer at a time (layers only meet in a move budget, which is left out). The linear form of the
MoE time replaces the curve, as in the search; where it matters the report compares both solutions
under it. CP-SAT (ortools) and HiGHS (highspy) cannot be imported in one process, so each runs in
one of its own: ``python -m gimbal.core.placement.exact cp-sat`` reads from standard input.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib import import_module, util
from typing import Any

import numpy as np

from gimbal.core.contracts import IntArray
from gimbal.core.errors import InputError, nearest
from gimbal.core.placement import objective
from gimbal.core.placement.bounds import send_costs
from gimbal.core.placement.problem import PlacementProblem

SOLVERS = {
    "cp-sat": ("ortools", "gimbal.core.placement.exact_cpsat"),
    "highs": ("highspy", "gimbal.core.placement.exact_highs"),
}


@dataclass(frozen=True, slots=True)
class ExactInstance:
    """One layer, microseconds per step. Lists, because it travels as JSON.

    Attributes:
        load: [copies - 1][expert] time of one of that many replicas, alpha included.
        send: [expert][rank] cost of sending all pairs of the expert to the rank.
        receive: [expert][rank] cost of the weights' arrival, 0 where they are already.
        slots: slots per rank.
        most_copies: replicas an expert may have.
        hint: [expert][rank] 0/1, a valid solution to start from.
    """

    load: list[list[float]]
    send: list[list[float]]
    receive: list[list[float]]
    slots: int
    most_copies: int
    hint: list[list[int]]

    @property
    def experts(self) -> int:
        return len(self.send)

    @property
    def ranks(self) -> int:
        return len(self.send[0])


@dataclass(frozen=True, slots=True)
class ExactResult:
    """Attributes:
    cost: objective of the best placement found; bound: proven lower bound of it.
    holds: [expert][rank] 0/1 that placement.
    """

    cost: float
    bound: float
    holds: list[list[int]]
    seconds: float


@dataclass(frozen=True, slots=True)
class ExactReport:
    """Sums over layers. `gap` is the heuristic's cost over the best known, minus one.

    `proven_gap` is the same against the solver's lower bound: an upper bound of the true gap.
    """

    solver: str
    heuristic_us: float
    exact_us: float
    bound_us: float
    layers: int
    optimal_layers: int
    seconds: float

    @property
    def gap(self) -> float:
        return self.heuristic_us / self.exact_us - 1.0

    @property
    def proven_gap(self) -> float:
        return self.heuristic_us / self.bound_us - 1.0

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "gap": self.gap, "proven_gap": self.proven_gap}


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
        load=load.tolist(),
        send=send_costs(problem, priced)[layer].tolist(),
        receive=receive.tolist(),
        slots=t.slots_per_rank,
        most_copies=most,
        hint=matrix(hint, t.ranks, experts).tolist(),
    )


def cost(model: ExactInstance, holds: IntArray | list[list[int]]) -> float:
    """Objective of a placement [experts, ranks] under the exact model, without `change_us`."""
    x = np.asarray(holds)
    copies = x.sum(axis=1)
    unit = np.asarray(model.load)[copies - 1, np.arange(len(x))]
    slowest = float((x * unit[:, None]).sum(axis=0).max())
    send = float((np.asarray(model.send) * x / copies[:, None]).sum())
    return slowest + send + float((np.asarray(model.receive) * x).sum())


def compare(
    problem: PlacementProblem,
    placement: IntArray,
    solver: str = "cp-sat",
    time_limit_s: float = 60.0,
    layers: int | None = None,
) -> ExactReport:
    """Solves the first `layers` layers exactly and prices `placement` beside them.

    Raises:
        InputError: unknown or missing solver, or a problem with a forecast (the exact model has
            no uncertainty) or with expert groups.
    """
    if solver not in SOLVERS:
        raise InputError(f"unknown solver {solver!r}{nearest(solver, SOLVERS)}")
    if util.find_spec(SOLVERS[solver][0]) is None:
        raise InputError(f"--exact needs {SOLVERS[solver][0]}: pip install 'gimbal-moe[solvers]'")
    if problem.forecast is not None or problem.group_locked:
        raise InputError("the exact solver takes neither a forecast nor expert groups")
    priced = objective.prices(problem)
    count = min(layers or problem.layers, problem.layers)
    models = [instance(problem, priced, n, placement[n]) for n in range(count)]
    results = solve(models, solver, time_limit_s)
    ours, best, bounds = [], [], []
    for n, (model, result) in enumerate(zip(models, results, strict=True)):
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
        solver=solver,
        heuristic_us=float(sum(ours)),
        exact_us=float(sum(best)),
        bound_us=float(sum(bounds)),
        layers=count,
        optimal_layers=optimal,
        seconds=float(sum(r.seconds for r in results)),
    )


def _with_change(
    model: ExactInstance, holds: IntArray | list[list[int]], now: IntArray, change_us: float
) -> float:
    """`cost`, and `change_us` when a rank receives an expert it does not hold `now`."""
    changed = bool((np.asarray(holds) > now).any())
    return cost(model, holds) + (change_us if changed else 0.0)


def solve(
    models: list[ExactInstance], solver: str = "cp-sat", time_limit_s: float = 60.0
) -> list[ExactResult]:
    """Solves each instance within `time_limit_s` in a process that loads only that solver."""
    request = json.dumps({"limit_s": time_limit_s, "models": [asdict(m) for m in models]})
    done = subprocess.run(
        [sys.executable, "-m", "gimbal.core.placement.exact", solver],
        input=request,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{solver} failed: {done.stderr.strip().splitlines()[-1:]}")
    return [ExactResult(**answer) for answer in json.loads(done.stdout.splitlines()[-1])]


def repaired(
    model: ExactInstance, bound: float, holds: list[list[int]], seconds: float
) -> ExactResult:
    """A solver's answer, or the hint when that is better; priced by `cost`, not by the solver."""
    best = min((holds, model.hint), key=lambda h: cost(model, h))
    value = cost(model, best)
    return ExactResult(value, min(bound, value), best, seconds)


def main() -> None:
    """The worker process: one solver's name as argument, instances in, answers out."""
    request = json.load(sys.stdin)
    module = import_module(SOLVERS[sys.argv[1]][1])
    models = [ExactInstance(**model) for model in request["models"]]
    answers = [asdict(module.solve_layer(model, request["limit_s"])) for model in models]
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
