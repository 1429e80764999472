"""The placement objective: microseconds per step, summed over layers.

Per layer, with c_e replicas of expert e sharing its pairs evenly (vLLM hashes tokens over them):

- load = max over ranks of moe_time(A_r, P_r), P_r pairs and A_r expected distinct active experts
  of one step on rank r. When the counts are a forecast with a standard deviation per expert, load
  is an upper bound of the *expected* maximum: (1/theta) log sum_r exp(theta t_r + theta^2 v_r/2)
  holds for independent Gaussian rank times t_r with variance v_r and any theta > 0 (Jensen).
- comm = bytes that leave the source's rank over the bandwidth of the tier they cross, averaged
  over ranks, which send at the same time. Zero when every rank gathers every token anyway.
- migration = experts received over bandwidth, plus a fixed cost per changed layer, divided by the
  horizon in steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gimbal.core.contracts import FloatArray, IntArray, Topology
from gimbal.core.cost.step import rank_moe_us
from gimbal.core.placement.problem import (
    CostConstants,
    PlacementProblem,
)

MAX_SHARPNESS = 300.0
"""Largest theta * (time of one replica): keeps exp() of a rank's time far from overflow."""


@dataclass(frozen=True, slots=True)
class CostTerms:
    """Microseconds per step over all layers, multipliers applied."""

    load: float
    comm: float
    migration: float

    @property
    def total(self) -> float:
        return self.load + self.comm + self.migration

    def as_dict(self) -> dict[str, float]:
        return {
            "load": self.load,
            "comm": self.comm,
            "migration": self.migration,
            "total": self.total,
        }


def moe_time_us(
    constants: CostConstants, active: FloatArray, pairs: FloatArray, gathered_tokens: FloatArray
) -> FloatArray:
    """MoE time of ranks with `active` distinct experts and `pairs` token-expert pairs a step."""
    return rank_moe_us(active, pairs, gathered_tokens, *constants.moe)


def replica_counts(placement: IntArray, experts: int) -> FloatArray:
    """[layers, experts] replicas of each expert."""
    layers = placement.shape[0]
    keys = placement.astype(np.intp) + experts * np.arange(layers)[:, None]
    counts = np.bincount(keys.ravel(), minlength=layers * experts)
    return counts.reshape(layers, experts).astype(np.float64)


@dataclass(frozen=True, slots=True)
class Prices:
    """The problem in per-step microseconds, independent of any placement.

    Attributes:
        pairs: [layers, experts] pairs per step over all sources.
        active: [layers, experts] probability that a step activates the expert.
        us_per_active, us_per_pair: [layers] gradient of the MoE time at the mean rank. The time
            is convex and homogeneous in (A, P), so the linear form bounds it from below.
        variance: [layers, experts] variance of pairs per step, zero when certain.
        theta: [layers] sharpness of the expected-maximum bound; 0 where nothing is uncertain.
        send_us: [tiers] time one pair per step adds when sent to same rank, node, other node.
        receive_us: amortized time of one received expert, gamma included.
        change_us: amortized fixed time of one changed layer, gamma included.
    """

    pairs: FloatArray
    active: FloatArray
    us_per_active: FloatArray
    us_per_pair: FloatArray
    variance: FloatArray
    theta: FloatArray
    send_us: FloatArray
    receive_us: float
    change_us: float

    @property
    def communicates(self) -> bool:
        return bool((self.send_us > 0).any())


def active_probability(problem: PlacementProblem, pairs: FloatArray) -> FloatArray:
    """[layers, experts] probability that a step of the whole group activates the expert.

    Recorded per-source probabilities combine as independent; otherwise pairs are Poisson.
    """
    recorded = problem.routing.active
    if recorded is None:
        return -np.expm1(-pairs)
    return np.asarray(1.0 - np.prod(1.0 - recorded, axis=0))


def prices(problem: PlacementProblem) -> Prices:
    """Turns counts into per-step prices."""
    p, c, ranks = problem, problem.constants, problem.topology.ranks
    pairs = p.expected / p.routing.steps
    active = active_probability(p, pairs)
    q = c.overlap_exponent
    reads = np.maximum(c.us_per_active_expert * active.sum(axis=1) / ranks, 1e-12)
    products = np.maximum(c.us_per_pair * pairs.sum(axis=1) / ranks, 1e-12)
    overlapped = (reads**q + products**q) ** (1.0 / q)
    # float32 drops the last bits, in which pow() may differ between two machines' libraries.
    # Rounding down keeps the linear form a lower bound.
    us_per_active = c.us_per_active_expert * (reads / overlapped) ** (q - 1.0)
    us_per_pair = c.us_per_pair * (products / overlapped) ** (q - 1.0)
    us_per_active, us_per_pair = _floor32(us_per_active), _floor32(us_per_pair)
    spread = np.zeros_like(pairs) if p.spread is None else p.spread / p.routing.steps
    variance = spread**2
    rank_variance = us_per_pair**2 * variance.sum(axis=1) / ranks
    replica_us = (us_per_pair[:, None] * pairs).max(axis=1) + us_per_active
    sharpest = MAX_SHARPNESS / np.maximum(replica_us, 1e-9)
    spread_us = np.sqrt(rank_variance)
    wanted = np.sqrt(2.0 * np.log(max(ranks, 2))) / np.maximum(spread_us, 1e-300)
    theta = np.where(spread_us > 0, np.minimum(wanted, sharpest), 0.0)
    return Prices(
        pairs=pairs,
        active=active,
        us_per_active=us_per_active,
        us_per_pair=us_per_pair,
        variance=variance,
        theta=theta,
        send_us=_send_us(problem),
        receive_us=p.gamma * c.expert_bytes / c.migration_gbps / 1e3 / p.horizon_steps / ranks,
        change_us=p.gamma * c.migration_fixed_us / p.horizon_steps,
    )


def round32(values: FloatArray) -> FloatArray:
    """`values` without the bits in which two machines' math libraries may differ."""
    return np.asarray(values, dtype=np.float32).astype(np.float64)


def _floor32(values: FloatArray) -> FloatArray:
    return np.nextafter(values.astype(np.float32), np.float32(0.0)).astype(np.float64)


def _send_us(problem: PlacementProblem) -> FloatArray:
    """[3] microseconds per step that one pair sent per step costs, by tier; beta included."""
    c, t = problem.constants, problem.topology
    if not problem.communicates:
        return np.zeros(3)
    gbps = np.array([c.same_rank_gbps, c.same_node_gbps, c.other_node_gbps])
    return np.asarray(problem.beta * c.bytes_per_pair / gbps / 1e3 / t.ranks)


def rank_sums(per_slot: FloatArray, topology: Topology) -> FloatArray:
    """[layers, ranks] sums of a [layers, slots] array over each rank's slots."""
    return np.asarray(per_slot.reshape(per_slot.shape[0], topology.ranks, -1).sum(axis=2))


def pair_loads(placement: IntArray, total: FloatArray, topology: Topology) -> FloatArray:
    """[layers, ranks] pairs under an even split over replicas; `total` is [layers, experts]."""
    unit = total / replica_counts(placement, total.shape[1])
    return rank_sums(np.take_along_axis(unit, placement.astype(np.intp), axis=1), topology)


def load_us(problem: PlacementProblem, priced: Prices, placement: IntArray) -> FloatArray:
    """[layers] load term without alpha."""
    topology, slots = problem.topology, placement.astype(np.intp)
    replicas = replica_counts(placement, problem.experts)
    pairs = pair_loads(placement, priced.pairs, topology)
    active = 1.0 - (1.0 - priced.active) ** (1.0 / replicas)
    active_r = rank_sums(np.take_along_axis(active, slots, axis=1), topology)
    gathered = priced.pairs.sum(axis=1, keepdims=True) / problem.constants.top_k
    time = moe_time_us(problem.constants, active_r, pairs, gathered)
    worst = time.max(axis=1)
    if problem.spread is None:
        return np.asarray(worst)
    unit_variance = priced.variance / replicas**2 * priced.us_per_pair[:, None] ** 2
    variance = rank_sums(np.take_along_axis(unit_variance, slots, axis=1), topology)
    theta = priced.theta[:, None]
    exponent = theta * (time - worst[:, None]) + theta**2 * variance / 2.0
    peak = exponent.max(axis=1)
    log_sum = peak + np.log(np.exp(exponent - peak[:, None]).sum(axis=1))
    return np.where(priced.theta > 0, worst + log_sum / np.maximum(priced.theta, 1e-300), worst)


def crossing_pairs(
    placement: IntArray, counts: FloatArray, topology: Topology
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """[layers] pairs that stay on the source's ranks, on its node, and that leave the node."""
    sources, layers, experts = counts.shape
    t = topology
    total = counts.sum(axis=(0, 2))
    if sources < t.sources:  # unknown sources: traffic taken as spread evenly over them
        own = total * t.ranks_per_source / t.ranks
        near = total * min(t.ranks_per_node, t.ranks) / t.ranks
        return own, np.maximum(near - own, 0.0), total - np.maximum(near, own)
    own = _pairs_met(placement, counts, t, t.ranks_per_source)
    node = total
    if t.ranks > t.ranks_per_node:
        by_node = np.zeros((-(-t.ranks // t.ranks_per_node), layers, experts))
        for source in range(sources):
            by_node[source * t.ranks_per_source // t.ranks_per_node] += counts[source]
        node = _pairs_met(placement, by_node, t, t.ranks_per_node)
    return own, node - own, total - node


def _pairs_met(
    placement: IntArray, origin: FloatArray, topology: Topology, ranks_each: int
) -> FloatArray:
    """[layers] pairs of origin o that meet their expert on o's own `ranks_each` ranks."""
    replicas = replica_counts(placement, origin.shape[2])
    at = np.arange(topology.slots) // topology.slots_per_rank // ranks_each
    index = placement.astype(np.intp)
    layer = np.arange(placement.shape[0])[:, None]
    share = 1.0 / np.take_along_axis(replicas, index, axis=1)
    return np.asarray((origin[at[None, :], layer, index] * share).sum(axis=1))


def received(placement: IntArray, current: IntArray, topology: Topology) -> IntArray:
    """[layers] slots whose expert was on no slot of that rank before: weights that travel."""
    layers = placement.shape[0]
    new = placement.reshape(layers, topology.ranks, -1)
    old = current.reshape(layers, topology.ranks, -1)
    if topology.slots_per_rank <= 16:
        known = (new[:, :, :, None] == old[:, :, None, :]).any(axis=3)
    else:
        experts = int(max(new.max(), old.max())) + 1
        holds = np.zeros((layers, topology.ranks, experts), dtype=bool)
        np.put_along_axis(holds, old.astype(np.intp), True, axis=2)
        known = np.take_along_axis(holds, new.astype(np.intp), axis=2)
    return np.asarray((~known).sum(axis=(1, 2)), dtype=np.int32)


def layer_costs(
    problem: PlacementProblem,
    priced: Prices,
    placement: IntArray,
    comm: FloatArray | None = None,
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """[layers] load, communication (unless given) and migration cost, multipliers applied."""
    load = problem.alpha * load_us(problem, priced, placement)
    if comm is None:
        comm = communication_us(problem, priced, placement)
    moved = received(placement, problem.current, problem.topology)
    migration = priced.receive_us * moved + priced.change_us * (moved > 0)
    return load, comm, migration


def communication_us(problem: PlacementProblem, priced: Prices, placement: IntArray) -> FloatArray:
    """[layers] communication term, beta included."""
    comm = np.zeros(problem.layers)
    if priced.communicates:
        counts = problem.routing.counts
        if problem.forecast is not None:
            counts = counts * problem.forecast.factor
        tiers = crossing_pairs(placement, counts, problem.topology)
        steps = problem.routing.steps
        for tier_pairs, price in zip(tiers, priced.send_us, strict=True):
            comm += tier_pairs / steps * price
    return comm


def evaluate(
    problem: PlacementProblem, placement: IntArray, priced: Prices | None = None
) -> CostTerms:
    """Cost of putting `placement` in force instead of `problem.current`."""
    terms = layer_costs(problem, priced or prices(problem), placement)
    return CostTerms(*(float(term.sum()) for term in terms))


def balance(placement: IntArray, counts: FloatArray, topology: Topology) -> float:
    """Mean over layers of mean/max rank pairs; 1 is perfect. Layers without traffic count 1."""
    loads = pair_loads(placement, counts.sum(axis=0), topology)
    worst = loads.max(axis=1)
    return float(np.where(worst > 0, loads.mean(axis=1) / np.maximum(worst, 1e-300), 1.0).mean())


def local_share(
    placement: IntArray, counts: FloatArray, topology: Topology, pairs: float | None = None
) -> float:
    """Share of routed pairs whose expert sits on the source's own ranks; `pairs` is their sum."""
    if counts.shape[0] < topology.sources:
        own = crossing_pairs(placement, counts, topology)[0]
    else:
        own = _pairs_met(placement, counts, topology, topology.ranks_per_source)
    return float(own.sum() / max(counts.sum() if pairs is None else pairs, 1e-300))
