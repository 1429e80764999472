"""DeepSeek's EPLB, the algorithm vLLM's default policy also follows (baseline).

Published at github.com/deepseek-ai/EPLB (README and `eplb.py`, commit d52c72d). Three steps: pack
expert groups to nodes, give each spare slot of a node to the expert whose replicas are busiest,
pack replicas to the node's ranks, heaviest first onto the lightest rank that has room. It looks
at total load only: not at who asks, nor at what is already where.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gimbal.core.contracts import FloatArray, IntArray, RoutingCounts, Topology
from gimbal.core.options import PositiveCount, option


def _pack(weights: FloatArray, bins: int) -> NDArray[np.intp]:
    """[items] bin of each item: heaviest first to the lightest bin; bins hold equally many."""
    room = np.full(bins, len(weights) // bins)
    load = np.zeros(bins)
    chosen = np.empty(len(weights), dtype=np.intp)
    for item in np.argsort(-weights, kind="stable"):
        lightest = int(np.argmin(np.where(room > 0, load, np.inf)))
        chosen[item] = lightest
        load[lightest] += weights[item]
        room[lightest] -= 1
    return chosen


def _replicate(weights: FloatArray, slots: int, most: int) -> tuple[NDArray[np.intp], FloatArray]:
    """Experts of `slots` replicas and their unit loads; an expert has at most `most` replicas.

    The published algorithm has no such limit; without it one rank may hold an expert twice.
    """
    copies = np.ones(len(weights))
    replicas = list(range(len(weights)))
    for _ in range(slots - len(weights)):
        busiest = int(np.argmax(np.where(copies < most, weights / copies, -1.0)))
        replicas.append(busiest)
        copies[busiest] += 1
    chosen = np.asarray(replicas, dtype=np.intp)
    return chosen, weights[chosen] / copies[chosen]


def _pack_distinct(
    experts: NDArray[np.intp], units: FloatArray, ranks: int, per_rank: int
) -> list[list[int]]:
    """Replicas packed to ranks like `_pack`, never two of one expert to a rank.

    When the last free ranks all hold the expert, it changes places with an expert elsewhere.
    """
    held: list[list[int]] = [[] for _ in range(ranks)]
    load = np.zeros(ranks)
    for item in np.argsort(-units, kind="stable"):
        expert = int(experts[item])
        full = np.array([len(h) >= per_rank for h in held])
        has = np.array([expert in h for h in held])
        if not (full | has).all():
            rank = int(np.argmin(np.where(full | has, np.inf, load)))
            held[rank].append(expert)
        else:
            rank = int(np.flatnonzero(~full)[0])
            other, index = next(
                (r, i)
                for r in np.argsort(load, kind="stable")
                if not has[r]
                for i, e in enumerate(held[r])
                if e not in held[rank]
            )
            held[rank].append(held[other][index])
            held[other][index] = expert
        load[rank] += units[item]
    return held


def _layer(weights: FloatArray, topology: Topology, groups: int, nodes: int) -> list[list[int]]:
    """Experts of every rank for one layer."""
    experts = len(weights)
    size = experts // groups
    node_of_group = _pack(weights.reshape(groups, size).sum(axis=1), nodes)
    ranks = topology.ranks // nodes
    plan: list[list[int]] = []
    for node in range(nodes):
        members = np.flatnonzero(np.repeat(node_of_group, size) == node)
        replicas, units = _replicate(weights[members], topology.slots // nodes, ranks)
        plan += _pack_distinct(members[replicas], units, ranks, topology.slots_per_rank)
    return plan


def eplb_placement(
    total: FloatArray, topology: Topology, groups: int = 1, nodes: int = 1
) -> IntArray:
    """[layers, slots] placement for `total` [layers, experts] pairs.

    As published, groups that do not divide over nodes fall back to one group and one node.
    """
    if nodes < 1 or groups % nodes or topology.ranks % nodes:
        groups = nodes = 1
    rows = [np.concatenate(_layer(row, topology, groups, nodes)) for row in total]
    return np.asarray(rows, dtype=np.int32)


def groups_respected(
    placement: IntArray, topology: Topology, experts: int, groups: int
) -> NDArray[np.bool_]:
    """[layers] True where every expert group lies in one node."""
    group = placement // (experts // groups)
    node = np.arange(topology.slots) // topology.slots_per_rank // topology.ranks_per_node
    low = np.full((len(placement), groups), np.iinfo(np.int64).max)
    high = np.full((len(placement), groups), -1)
    layer = np.broadcast_to(np.arange(len(placement))[:, None], group.shape)
    nodes = np.broadcast_to(node, group.shape)
    np.minimum.at(low, (layer, group), nodes)
    np.maximum.at(high, (layer, group), nodes)
    return np.asarray((low == high).all(axis=1))


def keep_slots(placement: IntArray, current: IntArray, topology: Topology) -> IntArray:
    """[layers, slots] `placement` with experts that stay on their rank in the slot they had."""
    result = placement.copy()
    for layer in range(placement.shape[0]):
        for first in range(0, topology.slots, topology.slots_per_rank):
            span = slice(first, first + topology.slots_per_rank)
            old, new = current[layer, span], list(placement[layer, span])
            kept = np.full(len(old), -1)
            for index, expert in enumerate(old):
                if expert in new:
                    kept[index] = expert
                    new.remove(expert)
            kept[kept < 0] = new
            result[layer, span] = kept
    return result


@dataclass(frozen=True, slots=True)
class EplbOptions:
    """Options of placer `eplb`."""

    groups: PositiveCount = option(1, "expert groups that share a node")
    nodes: PositiveCount = option(1, "nodes")


class EplbPlacer:
    """The published algorithm as a placer; experts that stay on a rank keep their slot."""

    Options = EplbOptions
    gated = False

    def __init__(self, options: EplbOptions = EplbOptions()) -> None:
        self._groups, self._nodes = options.groups, options.nodes

    def place(self, routing: RoutingCounts, topology: Topology, current: IntArray) -> IntArray:
        plan = eplb_placement(routing.counts.sum(axis=0), topology, self._groups, self._nodes)
        return keep_slots(plan, current, topology)
