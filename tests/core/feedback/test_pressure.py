import numpy as np
import pytest

from gimbal.core.contracts import RoutingCounts, Topology
from gimbal.core.feedback.pressure import (
    RankLoad,
    dispatch_pressure_us,
    expert_pressure_us,
    owner_pressure_us,
    rank_straggling_us,
    sending_pressure_us,
)
from gimbal.core.placement.problem import (
    GATHER_BACKEND,
    ROUTED_BACKEND,
    CostConstants,
    PlacementProblem,
)

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


def problem(backend, counts):
    topology = Topology(4, 2, ranks_per_source=2)
    current = np.arange(8, dtype=np.int32)[None, :]
    constants = CostConstants(bytes_per_pair=1e3, same_node_gbps=1.0)
    return PlacementProblem(
        RoutingCounts(np.array(counts, dtype=float), steps=10),
        topology,
        current,
        constants,
        backend=backend,
    )


def test_recorded_rows_press_the_engine_whose_pairs_leave():
    own, away = [100, 100, 100, 100, 0, 0, 0, 0], [0, 0, 0, 0, 100, 100, 100, 100]
    both_left = [[own], [own]]  # source 1 asks for experts on source 0's ranks
    # 400 pairs in 10 steps, 1 us each on one link, two links: 20 us, 10 above the mean
    np.testing.assert_allclose(dispatch_pressure_us(problem(ROUTED_BACKEND, both_left)), [0, 10])
    at_home = [[own], [away]]
    np.testing.assert_allclose(dispatch_pressure_us(problem(ROUTED_BACKEND, at_home)), [0, 0])


def test_under_all_gather_dispatch_can_relieve_nothing():
    hot = [[[900, 0, 0, 0, 0, 0, 0, 0]], [[900, 0, 0, 0, 0, 0, 0, 0]]]
    gathered = problem(GATHER_BACKEND, hot)
    assert expert_pressure_us(gathered)[0] > 0
    np.testing.assert_array_equal(dispatch_pressure_us(gathered), [0, 0])
