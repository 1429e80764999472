"""The oracle agrees with brute force, and the heuristic is near it."""

from __future__ import annotations

import signal
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest

from gimbal.core.errors import InputError
from gimbal.core.placement import exact, heuristic, objective
from tests.core.placement.problems import make


def brute_force(model: exact.ExactInstance) -> float:
    """Least cost over all placements of 2 ranks."""
    sets = list(combinations(range(model.experts), model.slots))
    best = np.inf
    for left in sets:
        for right in sets:
            holds = np.zeros((model.experts, 2), dtype=int)
            holds[list(left), 0], holds[list(right), 1] = 1, 1
            if holds.sum(axis=1).all():
                best = min(best, exact.cost(model, holds))
    return best


@pytest.mark.slow
@pytest.mark.parametrize("per_rank", [3, 4])
def test_the_oracle_matches_brute_force(per_rank: int) -> None:
    problem = make(5, layers=2, ranks=2, per_rank=per_rank, experts=6)
    priced = objective.prices(problem)
    plan = heuristic.plan(problem)
    for n in range(2):
        model = exact.instance(problem, priced, n, plan.physical_to_logical[n])
        answer = exact.solve(model, 20.0)
        best = brute_force(model)
        assert answer.cost == pytest.approx(best, rel=1e-4)
        assert answer.bound <= best * (1 + 1e-6)
        assert answer.bound == pytest.approx(best, rel=1e-3)


@pytest.mark.slow
def test_heuristic_is_near_the_optimum_of_a_small_instance() -> None:
    problem = make(1, layers=2, ranks=4, per_rank=4, experts=16)
    plan = heuristic.plan(problem)
    report = exact.compare(problem, plan.physical_to_logical, 20.0)
    assert report.optimal_layers == 2
    assert -1e-4 <= report.gap <= 0.08


@pytest.mark.slow
def test_the_oracle_stays_where_a_changed_layer_costs_more_than_it_gains() -> None:
    problem = make(1, layers=2, ranks=4, per_rank=4, experts=16)
    problem = replace(problem, gamma=1.0, horizon_steps=1)
    plan = heuristic.plan(problem)
    assert (plan.physical_to_logical == problem.current).all()
    report = exact.compare(problem, plan.physical_to_logical, 20.0)
    assert report.gap == pytest.approx(0.0, abs=1e-9)
    assert report.proven_gap == pytest.approx(0.0, abs=1e-9)
    forced = exact.compare(replace(problem, gamma=0.0), plan.physical_to_logical, 20.0)
    assert forced.gap > 0.0


def test_no_time_proves_nothing_and_says_so() -> None:
    problem = make(1, layers=2, ranks=4, per_rank=4, experts=16)
    plan = heuristic.plan(problem)
    report = exact.compare(problem, plan.physical_to_logical, 1e-9)
    assert report.exact_us <= report.heuristic_us
    assert 0.0 <= report.bound_us <= report.exact_us
    assert report.gap <= report.proven_gap
    empty = exact.ExactReport(0.0, 0.0, 0.0, 1, 1, 0.0)
    assert (empty.gap, empty.proven_gap) == (0.0, 0.0)
    assert exact.ExactReport(5.0, 5.0, 0.0, 1, 0, 0.0).proven_gap == float("inf")


def test_ctrl_c_ends_a_solve_wherever_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """While the model is built here: nothing is raised before the solver has ended, early."""
    problem = make(1, layers=1, ranks=8, per_rank=5, experts=32)
    ours = heuristic.plan(problem).physical_to_logical
    by_copies, ended = exact._by_copies, []

    def interrupted(*arguments: Any) -> Any:
        if arguments[1][0].index == 0:
            signal.raise_signal(signal.SIGINT)
        return by_copies(*arguments)

    def solved(*arguments: Any) -> Any:
        ended.append(original(*arguments))
        return ended[-1]

    original = exact._solve
    monkeypatch.setattr(exact, "_by_copies", interrupted)
    monkeypatch.setattr(exact, "_solve", solved)
    # Whoever has started these tests may ignore it.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            exact.compare(problem, ours, 1e6)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert [result.cost >= result.bound for result in ended] == [True]


def test_expert_groups_and_a_missing_solver_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make(per_rank=4, per_node=2)
    with pytest.raises(InputError, match="neither a forecast nor expert groups"):
        exact.compare(replace(problem, expert_groups=2), problem.current)
    monkeypatch.setattr(exact.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"gimbal-moe\[exact\]"):
        exact.compare(problem, problem.current)
