"""Pressure is time above the group's mean, on the ranks of the engine that owns them."""

import numpy as np
import pytest

from gimbal.core.contracts import RoutingCounts, Topology
from gimbal.core.feedback.pressure import expert_pressure_us
from gimbal.core.placement.problem import CostConstants, PlacementProblem

# One microsecond per pair and nothing else: pressures can be read off the loads.
PER_PAIR = CostConstants(
    moe_fixed_us=0.0,
    us_per_active_expert=0.0,
    us_per_pair=1.0,
    overlap_exponent=1.0,
    us_per_gathered_token=0.0,
)


def pressure(counts, topology, steps=1):
    counts = np.asarray(counts, dtype=float)
    current = np.tile(np.arange(counts.shape[2], dtype=np.int32), (counts.shape[1], 1))
    problem = PlacementProblem(
        RoutingCounts(counts, steps=steps), topology, current, constants=PER_PAIR
    )
    return expert_pressure_us(problem)


@pytest.mark.parametrize(
    ("loads", "steps", "expected"),
    [
        ([[10, 10, 10, 10]], 1, [0, 0]),
        ([[30, 10, 10, 10]], 1, [10, 0]),  # rank loads 40, 20: mean 30
        ([[30, 10, 10, 10]], 10, [1, 0]),
        ([[30, 10, 10, 10], [10, 10, 10, 30]], 1, [10, 10]),  # a layer each
        ([[0, 0, 0, 0]], 1, [0, 0]),
    ],
)
def test_two_engines_of_one_rank(loads, steps, expected):
    counts = np.zeros((2, len(loads), 4))
    counts[0] = loads  # who asks does not matter, who serves does
    got = pressure(counts, Topology(ranks=2, slots_per_rank=2), steps)
    np.testing.assert_allclose(got, expected, atol=1e-9)


def test_the_busiest_rank_of_an_engine_counts_in_every_layer():
    topology = Topology(ranks=4, slots_per_rank=1, ranks_per_source=2)
    counts = np.zeros((2, 2, 4))
    counts[0, 0] = [8, 0, 0, 0]  # mean 2: rank 0 is 6 above
    counts[0, 1] = [0, 4, 4, 0]  # mean 2: ranks 1 and 2 are 2 above
    np.testing.assert_allclose(pressure(counts, topology), [8, 2])


def test_unknown_sources_still_have_owners():
    """One row of counts for two engines: the pressure is about who serves."""
    got = pressure([[[30, 10, 10, 10]]], Topology(ranks=2, slots_per_rank=2))
    np.testing.assert_allclose(got, [10, 0])
