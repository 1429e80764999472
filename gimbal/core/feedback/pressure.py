"""Expert pressure: the straggling that an engine's experts cause, read by dispatch.

Every layer of a lock-step group lasts as long as its slowest rank. The pressure of an engine is
the time its own ranks' experts take above the group's mean, summed over layers: what moving
expert load away from it could save per step, and what sending it more of the same costs.
"""

from __future__ import annotations

import numpy as np

from gimbal.core.contracts import FloatArray
from gimbal.core.placement import objective
from gimbal.core.placement.problem import PlacementProblem


def expert_pressure_us(problem: PlacementProblem) -> FloatArray:
    """[sources] microseconds per step under the placement in force (`problem.current`).

    The busiest rank of the engine counts, in each layer for itself; an engine whose ranks are
    all at or below the mean has none.
    """
    topology, constants = problem.topology, problem.constants
    priced = objective.prices(problem)
    slots = problem.current.astype(np.intp)
    replicas = objective.replica_counts(problem.current, problem.experts)
    active = 1.0 - (1.0 - priced.active) ** (1.0 / replicas)
    times = objective.moe_time_us(
        constants,
        objective.rank_sums(np.take_along_axis(active, slots, axis=1), topology),
        objective.pair_loads(problem.current, priced.pairs, topology),
        priced.pairs.sum(axis=1, keepdims=True) / constants.top_k,
    )
    above = np.maximum(times - times.mean(axis=1, keepdims=True), 0.0)
    by_source = above.reshape(len(above), topology.sources, topology.ranks_per_source)
    return np.asarray(by_source.max(axis=2).sum(axis=0))
