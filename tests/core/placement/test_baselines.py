"""Baseline placers, verification, gate and output formats on small known cases."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import yaml

from gimbal.core.contracts import RoutingCounts, Topology
from gimbal.core.errors import InputError
from gimbal.core.placement import PLACERS, formats, gate, heuristic, verify
from gimbal.core.placement.eplb import eplb_placement
from gimbal.core.placement.forecast import falling, observe, predict
from gimbal.core.placement.objective import CostTerms, balance
from gimbal.testing import placement
from tests.core.placement.problems import make

# Two hot experts that both start on rank 0: 1 layer, 4 experts, 2 ranks x 2 slots.
HOT = 1e4 * np.array([[[50.0, 40.0, 6.0, 4.0]]])


@pytest.mark.parametrize("name", [n for n in PLACERS if n != "static"])
def test_every_placer_parts_two_hot_experts(name: str) -> None:
    topology, current = Topology(2, 2), placement(1, 4, 4)
    placed = PLACERS.build(name).place(RoutingCounts(HOT.repeat(2, axis=0)), topology, current)
    verify.check(placed, topology, 1, 4)
    hot_ranks = {int(slot) // 2 for slot in np.flatnonzero(np.isin(placed[0], [0, 1]))}
    assert hot_ranks == {0, 1}


@pytest.mark.parametrize("name", list(PLACERS))
@pytest.mark.parametrize("per_rank", [4, 6])
def test_every_placer_is_valid_and_repeats_itself(name: str, per_rank: int) -> None:
    problem = make(3, ranks=4, per_rank=per_rank, experts=16)
    first, second = (
        PLACERS.build(name).place(problem.routing, problem.topology, problem.current)
        for _ in range(2)
    )
    assert np.array_equal(first, second)
    verify.check(first, problem.topology, problem.layers, problem.experts)


def test_static_keeps_and_gated_keeps_what_it_cannot_better() -> None:
    problem = make()
    routing, topology = problem.routing, problem.topology
    static = PLACERS.build("static").place(routing, topology, problem.current)
    assert np.array_equal(static, problem.current)
    gated = PLACERS.build("eplb-gated")
    once = gated.place(routing, topology, problem.current)
    assert np.array_equal(gated.place(routing, topology, once), once)


def test_eplb_follows_the_published_example() -> None:
    """README of github.com/deepseek-ai/EPLB: 12 experts, 16 slots, 4 groups, 2 nodes, 8 ranks."""
    weight = np.array(
        [
            [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
            [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
        ],
        dtype=float,
    )
    placed = eplb_placement(weight, Topology(8, 2, 1, 4), groups=4, nodes=2)
    published = np.array(
        [
            [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
            [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
        ]
    )
    ours, theirs = (
        balance(p.astype(np.int32), weight[None], Topology(8, 2)) for p in (placed, published)
    )
    assert ours == pytest.approx(theirs)
    for layer in range(2):
        assert sorted(placed[layer]) == sorted(published[layer])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.__setitem__((0, 0), p[0, 1]), "expert 0 is missing"),
        (lambda p: p.__setitem__((0, 0), 16), "placement[0, 0]: expert 16"),
        (lambda p: p.__setitem__((1, 0), p[1, 1]), "placement[1]"),
    ],
)
def test_verify_refuses(change, message: str) -> None:
    placed = placement(2, 16, 16)
    change(placed)
    with pytest.raises(InputError) as caught:
        verify.check(placed, Topology(4, 4), 2, 16)
    assert message in str(caught.value)


def test_verify_refuses_two_replicas_on_a_rank() -> None:
    placed = np.array([[0, 0, 1, 2]], dtype=np.int32)
    problem = verify.problems(placed, Topology(2, 2), 1, 3)
    assert problem == "placement[0]: rank 0 holds expert 0 twice"


def test_digest_sees_order_and_ignores_integer_width() -> None:
    placed = placement(2, 16, 16)
    other = placed.copy()
    other[0, :2] = other[0, 1::-1]
    assert verify.digest(placed) != verify.digest(other)
    assert verify.digest(placed) == verify.digest(placed.astype(np.int64))


@pytest.mark.parametrize(
    ("horizon", "stall_us", "commit"),
    [(10_000, None, True), (10_000, 1e15, False), (1, None, False)],
)
def test_gate_weighs_gain_against_stall(horizon: int, stall_us: float, commit: bool) -> None:
    plan = heuristic.plan(make(horizon_steps=10_000))
    assert plan.moved_slots > 0
    stall = stall_us if stall_us is not None else plan.after.migration * 10_000
    decision = gate.decide(plan, horizon, stall_us=stall)
    assert decision.commit is commit
    per_step = plan.before.load + plan.before.comm - plan.after.load - plan.after.comm
    assert decision.gain_us == pytest.approx(per_step * horizon)


@pytest.mark.parametrize(
    ("before_us", "after_us", "migration_us", "safety", "commit"),
    [
        (2.0, 1.0, 0.0, 0.0, True),
        (1e-300, 0.0, 0.0, 0.0, False),  # rounding, no gain
        (1.0, 2.0, 0.0, 0.0, False),
        (math.inf, 1.0, 0.0, 0.0, False),
        (math.inf, math.inf, 0.0, 0.0, False),
        (math.nan, 1.0, 0.0, 0.0, False),
        (2.0, 1.0, math.inf, 0.0, False),
        (2.0, 1.0, math.nan, 1.0, False),
        (2.0, 1.0, -1.0, 1.0, False),
        (1e308, 1.0, 0.0, 1.0, False),  # times the horizon
    ],
)
@pytest.mark.parametrize("stall_scale", [None, 1.0, math.inf, math.nan])
def test_no_gain_that_is_not_a_finite_number_is_committed(
    before_us: float,
    after_us: float,
    migration_us: float,
    safety: float,
    commit: bool,
    stall_scale: float | None,
) -> None:
    plan = replace(
        heuristic.plan(make()),
        before=CostTerms(before_us, 0.0, 0.0),
        after=CostTerms(after_us, 0.0, migration_us),
    )
    decision = gate.decide(plan, 1000, 1.0, safety)
    if stall_scale is not None:  # as the planner corrects it by what the last one took
        commit = commit and math.isfinite(stall_scale)
        decision = gate.decide(plan, 1000, 1.0, safety, decision.stall_us * stall_scale)
    assert decision.commit is commit
    assert all(map(math.isfinite, (decision.gain_us, decision.stall_us)))
    if not math.isfinite(before_us * 1000):
        assert not gate.ungated(decision, plan.moved_slots).commit


def test_gate_passes_nothing_when_nothing_moves() -> None:
    problem = make()
    plan = heuristic.price(problem, problem.current)
    assert not gate.decide(plan, 1000).commit


def test_forecast_learns_regression_and_spread() -> None:
    rng = np.random.default_rng(0)
    state, windows = None, []
    for _ in range(6):  # every window draws hot experts anew: nothing of a share is left
        total = np.full((40, 8), 10.0)
        total[np.arange(40), rng.integers(0, 8, 40)] = 100.0
        windows.append(total)
        state = observe(state, total)
    forecast = predict(state, windows[-1])
    expected = windows[-1] * forecast.factor
    hot = windows[-1] == 100.0
    assert expected[hot].mean() == pytest.approx(np.sqrt(100.0 * 21.0), rel=0.2)
    assert (forecast.spread > 10.0).all()
    steady = observe(observe(None, windows[0]), windows[0])
    same = predict(steady, windows[0])
    assert np.allclose(same.factor, 1.0)
    assert np.allclose(same.spread, 0.0)


def test_falling_is_the_closest_non_increasing_sequence() -> None:
    assert falling(np.array([3.0, 1.0, 2.0, 0.0])).tolist() == [3.0, 1.5, 1.5, 0.0]


def test_formats_of_other_engines() -> None:
    placed = placement(2, 6, 4)
    sglang = json.loads(formats.sglang(placed, first_layer=1))
    assert sglang["physical_to_logical_map"] == [placed[0].tolist(), *placed.tolist()]
    trtllm = yaml.safe_load(formats.trtllm(placed, first_layer=3))
    assert trtllm["num_slots"] == 6
    assert trtllm["initial_global_assignments"] == {3: placed[0].tolist(), 4: placed[1].tolist()}
