"""Placement problems for tests: random valid ones, and one with known answers."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from gimbal.core.contracts import RoutingCounts, Topology
from gimbal.core.placement.backends import BACKENDS
from gimbal.core.placement.forecast import Forecast
from gimbal.core.placement.problem import PlacementProblem
from gimbal.testing import placement


def make(
    seed: int = 0,
    layers: int = 3,
    ranks: int = 4,
    per_rank: int = 5,
    experts: int = 16,
    tp: int = 1,
    per_node: int = 8,
    **options: object,
) -> PlacementProblem:
    """A skewed random problem; `options` go to PlacementProblem."""
    rng = np.random.default_rng(seed)
    counts = np.floor(rng.pareto(1.2, (ranks // tp, layers, experts)) * 50)
    topology = Topology(ranks, per_rank, tp, per_node)
    current = placement(layers, topology.slots, experts)
    return PlacementProblem(RoutingCounts(counts, steps=4), topology, current, **options)


@st.composite
def problems(draw: st.DrawFn) -> PlacementProblem:
    """Any valid problem of a few layers whose current placement meets the constraints."""
    tp = draw(st.sampled_from([1, 2]))
    ranks = tp * draw(st.integers(1, 4))
    per_rank = draw(st.integers(1, 6))
    experts = draw(st.integers(per_rank, ranks * per_rank))
    layers = draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    counts = np.floor(rng.pareto(draw(st.sampled_from([0.7, 3.0])), (ranks // tp, layers, experts)))
    counts *= draw(st.sampled_from([0.0, 1.0, 1000.0]))
    current = placement(layers, ranks * per_rank, experts)
    for row in current:  # other valid placements: permuted experts and ranks
        row[:] = rng.permutation(experts)[row]
    active = rng.random(counts.shape) if draw(st.booleans()) else None
    forecast = None
    if draw(st.booleans()):
        total = counts.sum(axis=0)
        spread = rng.random(total.shape) * total if draw(st.booleans()) else None
        forecast = Forecast(0.5 + rng.random(total.shape), spread)
    return PlacementProblem(
        RoutingCounts(counts, active, steps=draw(st.sampled_from([1, 50]))),
        Topology(ranks, per_rank, tp, draw(st.sampled_from([tp, 2 * tp, 8]))),
        current,
        alpha=draw(st.sampled_from([0.0, 1.0, 3.0])),
        beta=draw(st.sampled_from([0.0, 1.0])),
        gamma=draw(st.sampled_from([0.0, 1.0])),
        horizon_steps=draw(st.sampled_from([1, 10_000])),
        backend=draw(st.sampled_from(BACKENDS)),
        forecast=forecast,
        max_received=draw(st.sampled_from([None, 0, 3])),
    )
