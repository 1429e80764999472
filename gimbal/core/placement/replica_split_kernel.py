"""Compiled inner loops of `replica_split`; imported only there, since numba is slow to load."""

from __future__ import annotations

import numpy as np

from gimbal.core.compiled import njit


@njit(nogil=True)
def split_layers(  # type: ignore[no-untyped-def]
    counts, placement, rank, source_of, node_of, node, ranks, spill, shares
):
    """Fills `shares` [sources, layers, slots]; arguments as in `replica_split.near_split`.

    `rank`, `source_of`, `node_of` say where each slot lives, `node` where each source does.
    """
    for layer in range(placement.shape[0]):
        slots, demand = placement[layer], counts[:, layer]
        tier = np.empty((counts.shape[0], slots.size), dtype=np.int64)
        for source in range(counts.shape[0]):
            for slot in range(slots.size):
                if source_of[slot] == source:
                    tier[source, slot] = 0
                elif node_of[slot] == node[source]:
                    tier[source, slot] = 1
                else:
                    tier[source, slot] = 2
        even, fixed, replicas = _even_split(demand, slots, rank, ranks, shares[:, layer])
        limit = max(spill * even.sum() / ranks, fixed.max())
        near, load = _fill_near(demand, slots, rank, tier, replicas, fixed, limit)
        if load.max() > max(limit, even.max()) * (1.0 + 1e-9):
            continue
        for source in range(counts.shape[0]):
            for slot in range(slots.size):
                expert = slots[slot]
                if replicas[expert] > 1.0 and demand[source, expert] > 0.0:
                    shares[source, layer, slot] = near[source, slot]


@njit(nogil=True)
def _even_split(demand, slots, rank, ranks, shares):  # type: ignore[no-untyped-def]
    """Writes the even split; returns its rank loads, those of single-slot experts, replicas."""
    replicas = np.zeros(demand.shape[1])
    for slot in range(slots.size):
        replicas[slots[slot]] += 1.0
    even, fixed = np.zeros(ranks), np.zeros(ranks)
    for slot in range(slots.size):
        expert = slots[slot]
        asked = demand[:, expert].sum()
        shares[:, slot] = 1.0 / replicas[expert]
        even[rank[slot]] += asked / replicas[expert]
        if replicas[expert] == 1.0:
            fixed[rank[slot]] += asked
    return even, fixed, replicas


@njit(nogil=True)
def _fill_near(demand, slots, rank, tier, replicas, fixed, limit):  # type: ignore[no-untyped-def]
    """Shares when every source fills near slots first; returns them and the rank loads."""
    near, load = np.zeros(tier.shape), fixed.copy()
    # Hot experts first: the small ones fill what room is left. The stable order is the same on
    # every rank.
    for expert in np.argsort(-demand.sum(axis=0), kind="mergesort"):
        if replicas[expert] == 1.0:
            continue
        held = np.flatnonzero(slots == expert)
        for source in range(demand.shape[0]):
            asked = demand[source, expert]
            left = asked
            for wanted in range(3):
                for slot in held:
                    if tier[source, slot] != wanted or left <= 0.0:
                        continue
                    take = min(left, max(limit - load[rank[slot]], 0.0))
                    near[source, slot] += take / asked
                    load[rank[slot]] += take
                    left -= take
            if left > 0.0:
                best = held[np.argmin(load[rank[held]])]
                near[source, best] += left / asked
                load[rank[best]] += left
    return near, load
