"""Proven lower bounds of the placement objective, to say how far a plan can be from the best.

`mean_bound`: no plan makes the slowest rank faster than the mean rank, and no replica is reached
more cheaply than on its best rank. The search computes it on the way.
"""

from __future__ import annotations

import numpy as np

from gimbal.core.contracts import FloatArray
from gimbal.core.placement.objective import Prices, moe_time_us
from gimbal.core.placement.problem import PlacementProblem


def load_floor_us(problem: PlacementProblem, priced: Prices) -> FloatArray:
    """[layers] least possible load term, alpha included.

    The mean rank: pairs are shared out whole, active experts only grow with replicas, and the
    MoE time is convex and grows with both. The hottest expert: on the most replicas it can have,
    one rank still carries that share of its pairs. An expected maximum is never below either.
    """
    ranks = problem.topology.ranks
    spare = problem.topology.slots - problem.experts
    most_copies = min(ranks, 1 + spare)
    hottest = priced.pairs.max(axis=1) / most_copies
    gathered = priced.pairs.sum(axis=1) / problem.constants.top_k
    mean = moe_time_us(
        problem.constants,
        priced.active.sum(axis=1) / ranks,
        priced.pairs.sum(axis=1) / ranks,
        gathered,
    )
    alone = moe_time_us(problem.constants, np.zeros_like(hottest), hottest, gathered)
    return problem.alpha * np.maximum(mean, alone)


def send_costs(problem: PlacementProblem, priced: Prices) -> FloatArray:
    """[layers, experts, ranks] communication cost of all pairs of an expert sent to one rank."""
    t, counts = problem.topology, problem.routing.counts
    if problem.forecast is not None:
        counts = counts * problem.forecast.factor
    layers, experts = problem.layers, problem.experts
    cost = np.zeros((layers, experts, t.ranks))
    if not priced.communicates:
        return cost
    same, near, far = priced.send_us / problem.routing.steps
    source = np.arange(t.ranks) // t.ranks_per_source
    home = np.arange(t.sources) * t.ranks_per_source // t.ranks_per_node
    by_node = np.zeros((problem.nodes, layers, experts))
    for index in range(counts.shape[0]):
        by_node[home[index]] += counts[index]
    total = counts.sum(axis=0)
    for rank in range(t.ranks):
        own = counts[source[rank]]
        node = by_node[rank // t.ranks_per_node]
        cost[:, :, rank] = far * (total - node) + near * (node - own) + same * own
    return cost


def mean_bound(problem: PlacementProblem, priced: Prices) -> float:
    """Lower bound of the total cost in microseconds per step, from means and best ranks."""
    bound = float(load_floor_us(problem, priced).sum())
    if priced.communicates:
        bound += float(send_costs(problem, priced).min(axis=2).sum())
    return bound
