"""Baselines: offline placements by affinity, made once from a whole trace and never changed.

`MoeTunerPlacer`, in the manner of MoETuner (arXiv 2502.06643): load balance and communication
weighed together; its integer program is stood in for by a greedy in descending load.
`SemMoePlacer`, in the manner of Sem-MoE (arXiv 2503.04398): experts go to the source that asks
for them most, as far as slots and a load limit allow. Both methods follow tokens between layers
in their papers; here affinity is to the source engine, the one that placement can serve. Given the
trace they are measured on (`trace`), they are oracles: an upper bound for any static placement.
"""

from __future__ import annotations

import numpy as np

from gimbal.core.contracts import FloatArray, IntArray, RoutingCounts, Topology


def _fill_spare(
    held: list[list[int]], load: FloatArray, total: FloatArray, per_rank: int
) -> IntArray:
    """[slots]: free slots take the hottest experts their rank does not hold, coolest rank first."""
    copies = np.ones(len(total))
    while any(len(experts) < per_rank for experts in held):
        free = [rank for rank, experts in enumerate(held) if len(experts) < per_rank]
        rank = min(free, key=lambda r: (load[r], r))
        missing = np.setdiff1d(np.arange(len(total)), held[rank])
        expert = int(missing[np.argmax(total[missing] / copies[missing])])
        copies[expert] += 1
        held[rank].append(expert)
        load[rank] += total[expert] / copies[expert]
    return np.concatenate([np.asarray(experts, dtype=np.int32) for experts in held])


def _by_affinity(
    counts: FloatArray, topology: Topology, balance_weight: float, limit: float
) -> IntArray:
    """One layer's [slots]; `counts` [sources, experts].

    Heaviest expert first; a rank costs ``balance_weight * load/mean - own share`` and is closed
    when full or, as long as another is open, when it would exceed `limit` times the mean load.
    """
    total = counts.sum(axis=0)
    mean = max(total.sum() / topology.ranks, 1e-300)
    owner = np.arange(topology.ranks) // topology.ranks_per_source
    # Spare slots are for replicas: first placements take an even share of the experts.
    room = np.full(topology.ranks, -(-len(total) // topology.ranks))
    held: list[list[int]] = [[] for _ in range(topology.ranks)]
    load = np.zeros(topology.ranks)
    for expert in np.argsort(-total, kind="stable"):
        share = counts[owner % len(counts), expert] / max(total[expert], 1e-300)
        cost = balance_weight * load / mean - share
        heavy = load + total[expert] > limit * mean
        cost = np.where(heavy, cost + 1e3 * (load / mean + 1.0), cost)
        rank = int(np.argmin(np.where(room > 0, cost, np.inf)))
        held[rank].append(int(expert))
        load[rank] += total[expert]
        room[rank] -= 1
    return _fill_spare(held, load, total, topology.slots_per_rank)


class MoeTunerPlacer:
    """Balance and affinity weighed equally; see the module."""

    gated = False
    balance_weight, limit = 1.0, 1.05

    def __init__(self, trace: RoutingCounts | None = None) -> None:
        self._trace = trace
        self._placement: IntArray | None = None

    def place(self, routing: RoutingCounts, topology: Topology, current: IntArray) -> IntArray:
        if self._placement is None:
            counts = (self._trace or routing).counts
            self._placement = np.stack(
                [
                    _by_affinity(counts[:, layer], topology, self.balance_weight, self.limit)
                    for layer in range(counts.shape[1])
                ]
            )
        return self._placement.copy()


class SemMoePlacer(MoeTunerPlacer):
    """Affinity first, load only through a loose limit; see the module."""

    balance_weight, limit = 0.05, 1.25
