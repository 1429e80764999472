import numpy as np
import pytest

from gimbal.core.contracts import RoutingCounts, Topology
from gimbal.core.feedback.pressure import (
    RankLoad,
    expert_pressure_us,
    owner_pressure_us,
    rank_straggling_us,
    sending_pressure_us,
    wire_us_per_pair,
)
from gimbal.core.placement.backends import GATHER_BACKEND
from gimbal.core.placement.problem import CostConstants, PlacementProblem

# No overlap: a rank's time is active * 2 + pairs * 0.5 microseconds.
LINEAR = CostConstants(us_per_active_expert=2.0, us_per_pair=0.5, overlap_exponent=1.0)


def load(pairs, active, share):
    return RankLoad(*(np.array(a, dtype=float) for a in (pairs, active, share)))


@pytest.mark.parametrize(
    ("pairs", "active", "share", "expected"),
    [
        # even ranks straggle behind nobody
        ([[[10, 10]], [[2, 2]]], [[[4, 4]], [[1, 1]]], [0.5, 0.5], [0, 0]),
        # prefill only: 20 pairs more than the other rank are 10 us, 5 above the mean
        ([[[30, 10]], [[0, 0]]], [[[4, 4]], [[0, 0]]], [1, 0], [5, 0]),
        # decode only: two more distinct experts are 4 us, 2 above the mean
        ([[[0, 0]], [[8, 8]]], [[[0, 0]], [[3, 5]]], [0, 1], [0, 2]),
        # kinds are weighed by how often they run, and do not cancel
        ([[[30, 10]], [[8, 8]]], [[[4, 4]], [[3, 5]]], [0.25, 0.75], [1.25, 1.5]),
        # two layers with different hot ranks: each waits for its own
        ([[[30, 10], [10, 30]], [[0, 0]] * 2], [[[4, 4]] * 2, [[0, 0]] * 2], [1, 0], [5, 5]),
    ],
)
def test_straggling_of_ranks(pairs, active, share, expected):
    result = rank_straggling_us(load(pairs, active, share), LINEAR)
    np.testing.assert_allclose(result, expected)


def test_an_engine_is_pressed_by_its_busiest_rank():
    np.testing.assert_array_equal(owner_pressure_us(np.array([1.0, 7.0, 3.0, 0.0]), 2), [7, 3])


def test_sending_pressure_is_what_an_engine_sends_above_the_mean():
    leaving = np.array([[40.0, 10.0], [20.0, 30.0]])  # [engines, layers]
    np.testing.assert_allclose(sending_pressure_us(leaving, 0.1), [1.0, 1.0])
    np.testing.assert_array_equal(sending_pressure_us(leaving, 0.0), [0, 0])


def test_the_fused_kernel_part_matches_the_step_model():
    """One formula in two places: the cost model's MoE term without what all ranks share."""
    from gimbal.core.cost.profile import load_profile
    from gimbal.core.cost.step import moe_us
    from gimbal.core.feedback.pressure import moe_kernel_us
    from gimbal.core.placement.problem import constants_of

    profile = load_profile("h100-qwen3-30b-a3b")
    active, pairs = np.array([[20.0, 28.0]]), np.array([[500.0, 300.0]])
    slowest = moe_kernel_us(active, pairs, constants_of(profile)).max()
    assert slowest + profile.moe.base_us == pytest.approx(moe_us(profile, active, pairs, 0.0))


def test_an_engine_whose_ranks_hold_the_hot_expert_straggles():
    topology = Topology(4, 2, ranks_per_source=2)
    counts = np.zeros((2, 1, 8))
    counts[:, :, 0] = 900.0
    problem = PlacementProblem(
        RoutingCounts(counts, steps=10),
        topology,
        np.arange(8, dtype=np.int32)[None, :],
        backend=GATHER_BACKEND,
    )
    straggling = expert_pressure_us(problem)
    assert straggling[0] > 0
    assert straggling[1] == 0


@pytest.mark.parametrize(("nodes", "expected"), [(1, 2.0), (2, 20.0)])
def test_a_pair_on_the_wire_is_priced_by_the_slowest_tier_in_use(nodes, expected):
    constants = CostConstants(bytes_per_pair=4e3, same_node_gbps=2.0, other_node_gbps=0.2)
    assert wire_us_per_pair(constants, nodes) == pytest.approx(expected)
