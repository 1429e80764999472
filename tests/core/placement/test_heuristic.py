"""The planner: valid, never worse, the same everywhere, within its budget, near the optimum."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings

from gimbal.core.contracts import RoutingCounts, Topology
from gimbal.core.placement import heuristic, kernel, objective, verify
from gimbal.core.placement.eplb import eplb_placement, groups_respected
from gimbal.core.placement.problem import CostConstants, PlacementProblem
from gimbal.testing import placement
from tests.core.placement.problems import make, problems


@settings(max_examples=150)
@given(problem=problems())
def test_any_valid_problem_gives_a_valid_plan_that_is_never_worse(
    problem: PlacementProblem,
) -> None:
    if not heuristic.usable(problem).all():
        problem = PlacementProblem(
            problem.routing,
            problem.topology,
            eplb_placement(problem.measured, problem.topology),
            max_received=problem.max_received,
        )
    plan = heuristic.plan(problem)
    verify.check(plan.physical_to_logical, problem.topology, problem.layers, problem.experts)
    assert plan.after.total <= plan.before.total * (1 + 1e-9) + 1e-9
    assert plan.lower_bound_us <= plan.after.total * (1 + 1e-6) + 1e-9
    assert plan.before.total == pytest.approx(
        objective.evaluate(problem, problem.current).total, rel=1e-9, abs=1e-6
    )
    assert plan.after.total == pytest.approx(
        objective.evaluate(problem, plan.physical_to_logical).total, rel=1e-9, abs=1e-6
    )
    # Experts that stay on their rank keep their slot: what moves is what must be received.
    assert plan.moved_slots == plan.received_experts
    if problem.max_received is not None:
        assert plan.received_experts <= problem.max_received
    again = heuristic.plan(problem)
    assert np.array_equal(again.physical_to_logical, plan.physical_to_logical)


def test_doubles_on_a_rank_are_repaired() -> None:
    problem = make(ranks=4, per_rank=5, experts=16)
    current = problem.current.copy()
    current[0, :5] = [0, 0, 1, 2, 3]
    current[0, 15:] = [4, 12, 13, 14, 15]
    current[0, 5:15] = [5, 6, 7, 8, 9, 10, 11, 4, 1, 2]
    problem = PlacementProblem(problem.routing, problem.topology, current)
    assert not heuristic.usable(problem)[0]
    plan = heuristic.plan(problem)
    verify.check(plan.physical_to_logical, problem.topology, problem.layers, problem.experts)


def test_expert_groups_stay_in_one_node() -> None:
    problem = make(ranks=8, per_rank=6, experts=32, per_node=4, expert_groups=4)
    plan = heuristic.plan(problem)
    assert groups_respected(plan.physical_to_logical, problem.topology, 32, 4).all()
    verify.check(plan.physical_to_logical, problem.topology, problem.layers, problem.experts)
    settled = PlacementProblem(
        problem.routing,
        problem.topology,
        plan.physical_to_logical,
        expert_groups=4,
    )
    again = heuristic.plan(settled)
    assert again.after.total <= again.before.total
    assert groups_respected(again.physical_to_logical, problem.topology, 32, 4).all()


def test_source_aware_traffic_is_brought_home() -> None:
    """Two sources, disjoint experts of equal load: the best plan serves everything locally."""
    counts = np.zeros((2, 1, 8))
    counts[0, 0, 1::2], counts[1, 0, 0::2] = 1000.0, 1000.0
    problem = PlacementProblem(RoutingCounts(counts), Topology(2, 4), placement(1, 8, 8))
    plan = heuristic.plan(problem)
    assert plan.local_share_planned == 1.0
    assert plan.balance_planned == 1.0
    assert plan.after.comm == pytest.approx(0.0, abs=1e-9)


def test_gather_backend_has_no_communication_term() -> None:
    routed, gathered = make(), make(backend="allgather_reducescatter")
    assert heuristic.plan(routed).before.comm > 0.0
    assert heuristic.plan(gathered).before.comm == 0.0


def test_nothing_moves_when_migration_is_dear() -> None:
    problem = make(constants=CostConstants(migration_fixed_us=1e12), horizon_steps=1)
    assert heuristic.plan(problem).moved_slots == 0


def test_without_drift_the_second_plan_moves_nothing() -> None:
    problem = make()
    first = heuristic.plan(problem)
    settled = PlacementProblem(problem.routing, problem.topology, first.physical_to_logical)
    assert heuristic.plan(settled).moved_slots == 0


_DIGEST = """
import sys
from gimbal.core.placement import heuristic, verify
from tests.core.placement.problems import make
plan = heuristic.plan(make(7, layers=9, ranks=8, per_rank=9, experts=64))
print(verify.digest(plan.physical_to_logical), plan.after.total.hex())
"""


@pytest.mark.slow
def test_the_same_in_every_process() -> None:
    answers = set()
    for threads, seed in (("1", "0"), ("1", "1"), ("2", "2")):
        env = {**os.environ, "PYTHONHASHSEED": seed, "NUMBA_NUM_THREADS": threads}
        done = subprocess.run(
            [sys.executable, "-c", _DIGEST],
            env=env,
            capture_output=True,
            text=True,
            check=True,
        )
        answers.add(done.stdout)
    assert len(answers) == 1


def test_all_problems_run_what_the_first_one_compiled() -> None:
    """A second signature would be compiled while a server is serving."""
    heuristic.plan(make())
    compiled = list(kernel.compiled().signatures)
    placer = heuristic.GimbalPlacer()
    for seed in range(3):
        problem = make(seed)
        counts = np.frombuffer(problem.routing.counts.tobytes()).reshape(
            problem.routing.counts.shape
        )
        assert not counts.flags.writeable
        placer.place(RoutingCounts(counts, steps=7), problem.topology, problem.current)
        heuristic.plan(make(seed, max_received=3))
        heuristic.plan(make(seed, backend="allgather_reducescatter"))
        heuristic.plan(make(seed, ranks=2, per_rank=32, experts=64))
    assert kernel.compiled().signatures == compiled


def test_placer_learns_the_forecast_and_stays_valid() -> None:
    placer = heuristic.GimbalPlacer()
    current = make().current
    for seed in range(4):
        problem = make(seed)
        current = placer.place(problem.routing, problem.topology, current)
        verify.check(current, problem.topology, problem.layers, problem.experts)
