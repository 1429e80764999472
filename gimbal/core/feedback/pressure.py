"""Expert pressure: the straggling that an engine's experts cause, read by dispatch.

Every layer of a lock-step group lasts as long as its slowest rank. The pressure of an engine is
the time its own ranks' experts take above the group's mean, summed over layers: what moving
expert load away from it could save per step, and what sending it more of the same costs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gimbal.core.contracts import FloatArray
from gimbal.core.placement import objective
from gimbal.core.placement.problem import CostConstants, PlacementProblem

PERIOD_STEPS = 32
"""Steps between updates of the pressure that dispatch reads."""


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


@dataclass(frozen=True, slots=True)
class RankLoad:
    """Recent expert load of each EP rank, by kind of step: 0 with prefill, 1 decode only.

    Apart, because they are bound by different things: a step with prefill by token-expert pairs,
    a decode step by the distinct experts whose weights it reads. A mean of both would predict the
    time of a step that never runs.

    Attributes:
        pairs: [2, layers, ranks] token-expert pairs per step of the kind.
        active: [2, layers, ranks] expected distinct experts hit per step of the kind.
        share: [2] share of recent steps that were of the kind; sums to 1, or to 0 without steps.
    """

    pairs: FloatArray
    active: FloatArray
    share: FloatArray


def rank_straggling_us(load: RankLoad, constants: CostConstants) -> FloatArray:
    """[ranks] microseconds per step by which a rank's experts take longer than the mean rank's.

    ``sum over kinds k of share_k * sum over layers of max(0, t_kr - mean_r t_kr)`` with t the MoE
    time of the cost model (docs/simulator.md). What all ranks pay alike is left out.
    """
    times = moe_kernel_us(load.active, load.pairs, constants)
    above = np.maximum(times - times.mean(axis=2, keepdims=True), 0.0).sum(axis=1)
    return np.asarray(load.share @ above)


def moe_kernel_us(active: FloatArray, pairs: FloatArray, constants: CostConstants) -> FloatArray:
    """[...] the part of a rank's MoE time that depends on what the rank holds, microseconds."""
    p = constants.overlap_exponent
    reads, products = constants.us_per_active_expert * active, constants.us_per_pair * pairs
    return np.asarray((reads**p + products**p) ** (1.0 / p))


def owner_pressure_us(straggling_us: FloatArray, ranks_per_engine: int) -> FloatArray:
    """[engines] the busiest of each engine's ranks, of [ranks] microseconds per step.

    This is pressure as the Gimbal paper (arXiv 2606.15177) describes it: a rank's load counts
    against the engine that owns it. Under a layer barrier it says where to move *experts*; moving
    *requests* away from the owner does not relieve the rank (docs/feedback-loop.md).
    """
    return np.asarray(straggling_us.reshape(-1, ranks_per_engine).max(axis=1))


def sending_pressure_us(leaving_pairs: FloatArray, us_per_pair: float) -> FloatArray:
    """[engines] microseconds per step by which an engine's sends take longer than the mean's.

    The only straggling of a layer barrier that follows the request and not the expert: pairs that
    leave an engine's ranks are the pairs of *its* requests, and the exchange ends with the engine
    that sends most. Zero under all-gather/reduce-scatter, where `us_per_pair` is 0.

    Args:
        leaving_pairs: [engines, layers] pairs per step whose expert is on another engine's rank.
        us_per_pair: bytes of one pair over an engine's bandwidth.
    """
    sends = us_per_pair * leaving_pairs
    return np.asarray(np.maximum(sends - sends.mean(axis=0), 0.0).sum(axis=1))


def wire_us_per_pair(constants: CostConstants, nodes: int) -> float:
    """Time of one pair that leaves its engine over one rank's bandwidth, microseconds.

    Between nodes the slower tier is taken for all pairs: it is what an exchange waits for.
    """
    tier = constants.same_node_gbps if nodes == 1 else constants.other_node_gbps
    return constants.bytes_per_pair / tier / 1e3
