"""One decision: constants to scale, the backend's bytes, the gate, baselines."""

import numpy as np
import pytest

from gimbal.core.config import PlacementConfig
from gimbal.core.contracts import RoutingCounts, Topology
from gimbal.core.cost.profile import load_profile
from gimbal.core.placement.kinds import StepKind
from gimbal.core.placement.planner import ModelFacts, cost_constants, planner_for
from gimbal.core.placement.problem import constants_of

QWEN3 = ModelFacts(9_437_184.0, 8, 4096.0, False, "allgather_reducescatter", 3000)
TOPOLOGY = Topology(2, 4)
CURRENT = np.tile(np.arange(8, dtype=np.int32), (3, 1))


def routing(seed=0):
    rng = np.random.default_rng(seed)
    hot = np.ones((2, 3, 8))
    hot[0, :, 4:], hot[1, :, :4] = 30.0, 30.0
    return RoutingCounts(rng.poisson(hot * 100).astype(float), steps=10)


def test_constants_scale_with_the_model():
    full = cost_constants(QWEN3)
    assert full == constants_of(load_profile("h100-qwen3-30b-a3b"))
    assert full.bytes_per_pair == 8192
    half = cost_constants(ModelFacts(9_437_184.0 / 2, 8, 2048.0, False, "naive", 3000))
    assert half.us_per_active_expert == pytest.approx(full.us_per_active_expert / 2)
    assert half.us_per_pair == pytest.approx(full.us_per_pair / 2)
    assert half.bytes_per_pair == 4096


def test_constants_come_from_the_profile_that_is_named():
    cpu = ModelFacts(196_608.0, 4, 512.0, True, "naive", 3000)
    named = cost_constants(cpu, "rtxpro6000-qwen3-30b-a3b")
    rtx = load_profile("rtxpro6000-qwen3-30b-a3b")
    assert named.moe_fixed_us == rtx.moe.base_us
    assert cost_constants(cpu) == cost_constants(cpu, "cpu-demo") != named
    planner = planner_for(PlacementConfig(profile="rtxpro6000-qwen3-30b-a3b"), cpu)
    assert planner.problem(routing(), TOPOLOGY, CURRENT).constants == named


@pytest.mark.parametrize(
    ("backend", "vllm_backend", "moves_for_locality"),
    [
        ("auto", "allgather_reducescatter", False),
        ("auto", "naive", False),
        ("auto", "deepep_low_latency", True),
        ("all2all", "allgather_reducescatter", True),
        ("allgather_reducescatter", "deepep_low_latency", False),
    ],
)
def test_locality_counts_only_where_bytes_depend_on_it(backend, vllm_backend, moves_for_locality):
    config = PlacementConfig(backend=backend, gate=0.0, gamma=0.0, beta=100.0)
    planner = planner_for(config, ModelFacts(9_437_184.0, 8, 4096.0, False, vllm_backend, 3000))
    decision = planner.decide(routing(), TOPOLOGY, CURRENT)
    assert (decision.local_share_after > 0.9) == moves_for_locality


def test_a_stall_that_was_longer_than_modelled_raises_the_bar():
    config = PlacementConfig(backend="all2all", gamma=0.01)
    planner = planner_for(config, QWEN3)
    first = planner.decide(routing(), TOPOLOGY, CURRENT)
    assert first.commit
    assert first.stall_us == first.modelled_stall_us > 0
    planner.forget()
    longer = first.gain_us_per_step * 3000 / first.stall_us * 2
    second = planner.decide(routing(), TOPOLOGY, CURRENT, stall_scale=longer)
    assert not second.commit
    assert second.stall_us == pytest.approx(first.stall_us * longer)


@pytest.mark.parametrize("placer", ["eplb", "static"])
def test_baselines_are_priced_like_ours(placer):
    planner = planner_for(PlacementConfig(placer=placer, gate=0.0), QWEN3)
    decision = planner.decide(routing(), TOPOLOGY, CURRENT)
    assert decision.placement.shape == CURRENT.shape
    if placer == "static":
        assert not decision.commit
        assert (decision.placement == CURRENT).all()


def test_gain_on_later_counts_is_zero_for_equal_maps():
    planner = planner_for(PlacementConfig(backend="all2all"), QWEN3)
    swapped = CURRENT[:, ::-1].copy()
    assert planner.gain_us_per_step(routing(), TOPOLOGY, CURRENT, CURRENT) == 0
    assert planner.gain_us_per_step(routing(), TOPOLOGY, CURRENT, swapped) > 0


def test_the_gain_lies_in_the_large_steps_and_is_spread_over_all():
    """A hot rank that a mean step hides: its weights are read anyway."""
    counts = np.full((1, 1, 8), 2e4)
    counts[:, :, :4] = 4e4
    routing = RoutingCounts(counts, steps=1000)
    topology = Topology(2, 4)
    before = np.arange(8, dtype=np.int32)[None]
    after = np.array([[0, 1, 4, 5, 2, 3, 6, 7]], dtype=np.int32)
    planner = planner_for(PlacementConfig(backend="allgather_reducescatter"), QWEN3)
    mean = planner.gain_us_per_step(routing, topology, before, after)
    large = planner.gain_us_per_step(routing, topology, before, after, (StepKind(0.01, 100.0),))
    assert large > 2 * mean > 0
