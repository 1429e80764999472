"""The exact placement model for HiGHS: a mixed-integer linear program."""
# The solver's expressions are untyped to mypy.
# mypy: ignore-errors

from __future__ import annotations

import highspy
import numpy as np

from gimbal.core.placement.exact import ExactInstance, ExactResult, repaired


def solve_layer(model: ExactInstance, limit_s: float) -> ExactResult:
    """Minimizes slowest rank + sends + receipts; see the linearization in docs/placement.md."""
    highs = highspy.Highs()
    highs.setOptionValue("output_flag", False)
    highs.setOptionValue("time_limit", limit_s)
    highs.setOptionValue("threads", 2)
    highs.setOptionValue("mip_rel_gap", 1e-5)
    experts, ranks, most = model.experts, model.ranks, model.most_copies
    load, send = np.asarray(model.load), np.asarray(model.send)
    receive = np.asarray(model.receive)
    x = [[highs.addBinary() for _ in range(ranks)] for _ in range(experts)]
    slowest = highs.addVariable(lb=float(load[0].sum() / ranks) if most == 1 else 0.0)
    rank_load: list[list[object]] = [[] for _ in range(ranks)]
    costs: list[object] = []
    for e in range(experts):
        chosen = [highs.addBinary() for _ in range(most)] if most > 1 else []
        if most == 1:
            highs.addConstr(sum(x[e][1:], x[e][0]) == 1)
        else:
            highs.addConstr(sum(chosen[1:], chosen[0]) == 1)
            copies = sum(((m + 1) * z for m, z in enumerate(chosen[1:], 1)), 1 * chosen[0])
            highs.addConstr(sum(x[e][1:], x[e][0]) - copies == 0)
        # y[m][r] = 1 when rank r holds e and e has m + 1 replicas.
        for r in range(ranks):
            ys = [x[e][r]] if most == 1 else [highs.addVariable(0, 1) for _ in range(most)]
            if most > 1:
                highs.addConstr(sum(ys[1:], ys[0]) - x[e][r] == 0)
                for m in range(most):
                    highs.addConstr(ys[m] - chosen[m] <= 0)
            for m, y in enumerate(ys):
                rank_load[r].append(float(load[m, e]) * y)
                costs.append(float(send[e, r] / (m + 1) + receive[e, r]) * y)
    for r in range(ranks):
        highs.addConstr(sum((x[e][r] for e in range(1, experts)), x[0][r]) == model.slots)
        highs.addConstr(sum(rank_load[r][1:], rank_load[r][0]) - slowest <= 0)
    highs.minimize(sum(costs, 1.0 * slowest))
    info = highs.getInfo()
    values = highs.getSolution().col_value
    holds = model.hint
    if values and info.primal_solution_status == 2:
        holds = [[round(values[v.index]) for v in row] for row in x]
    return repaired(model, float(info.mip_dual_bound), holds, float(highs.getRunTime()))
