"""The exact placement model for CP-SAT: integer loads, exact to about 1e-5 of the mean rank."""
# The solver's expressions are untyped to mypy.
# mypy: ignore-errors

from __future__ import annotations

import numpy as np
from ortools.sat.python import cp_model

from gimbal.core.placement.exact import ExactInstance, ExactResult, repaired

GRID = 100_000
"""Integer units of the mean rank's load."""


def solve_layer(model: ExactInstance, limit_s: float) -> ExactResult:
    """Minimizes slowest rank + sends + receipts; see the linearization in docs/placement.md."""
    cp = cp_model.CpModel()
    experts, ranks, most = model.experts, model.ranks, model.most_copies
    load, send = np.asarray(model.load), np.asarray(model.send)
    receive = np.asarray(model.receive)
    unit = max(load[0].sum() / ranks, 1e-12) / GRID
    x = [[cp.NewBoolVar(f"x{e},{r}") for r in range(ranks)] for e in range(experts)]
    terms: list[list[tuple[object, int]]] = [[] for _ in range(ranks)]
    costs: list[tuple[object, int]] = []
    for e in range(experts):
        # y[m][r]: rank r holds e and e has m + 1 replicas.
        chosen = [cp.NewBoolVar(f"z{e},{m}") for m in range(most)]
        cp.AddExactlyOne(chosen)
        cp.Add(sum(x[e]) == sum((m + 1) * z for m, z in enumerate(chosen)))
        for r in range(ranks):
            for m in range(most):
                y = x[e][r] if most == 1 else cp.NewBoolVar(f"y{e},{r},{m}")
                if most > 1:
                    cp.AddBoolAnd(x[e][r], chosen[m]).OnlyEnforceIf(y)
                    cp.AddBoolOr(x[e][r].Not(), chosen[m].Not(), y)
                terms[r].append((y, round(load[m, e] / unit)))
                costs.append((y, round((send[e, r] / (m + 1) + receive[e, r]) / unit)))
    for r in range(ranks):
        cp.Add(sum(x[e][r] for e in range(experts)) == model.slots)
    slowest = cp.NewIntVar(0, 10 * GRID * ranks, "slowest")
    for r in range(ranks):
        cp.Add(sum(y * w for y, w in terms[r]) <= slowest)
    cp.Minimize(slowest + sum(y * w for y, w in costs))
    for e in range(experts):
        for r in range(ranks):
            cp.AddHint(x[e][r], model.hint[e][r])
    solver = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = limit_s
    solver.parameters.num_workers = 2
    solver.parameters.random_seed = 0
    status = solver.Solve(cp)
    found = status in (cp_model.OPTIMAL, cp_model.FEASIBLE)
    holds = [[solver.Value(v) for v in row] for row in x] if found else model.hint
    # Every load and cost was rounded by at most half a unit per held replica.
    slack = 0.5 * (ranks * model.slots + model.slots) * unit
    bound = solver.BestObjectiveBound() * unit - slack
    return repaired(model, bound, holds, solver.WallTime())
