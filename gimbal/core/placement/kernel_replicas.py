"""How many replicas each expert has; compiled as a part of `kernel`."""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator"

from __future__ import annotations

import numpy as np
from numba import njit


@njit(nogil=True)
def drop_doubles(st, pairs, ranks, per_rank):
    """Replaces the second copy of an expert on one rank by the hottest expert missing there."""
    slots, copies, holds = st.slots, st.copies, st.holds
    for r in range(ranks):
        for s in range(r * per_rank, (r + 1) * per_rank):
            e = slots[s]
            first = True
            for t in range(r * per_rank, s):
                if slots[t] == e:
                    first = False
            if first:
                continue
            best, best_key = -1, -1.0
            for f in range(pairs.shape[0]):
                if not holds[r, f] and pairs[f] / copies[f] > best_key:
                    best, best_key = f, pairs[f] / copies[f]
            slots[s] = best
            holds[r, best] = 1
            copies[e] -= 1
            copies[best] += 1


@njit(nogil=True)
def _spare_slot(cold, hot, st, load, setup, spent):
    """Slot of `cold` on the coolest rank that may take `hot`, or -1."""
    slots, holds, home = st.slots, st.holds, st.home
    node = -1
    if setup.node_locked:
        for s in range(slots.shape[0]):
            if slots[s] == hot:
                node = s // setup.per_rank // setup.ranks_per_node
    best, best_load = -1, np.inf
    for s in range(slots.shape[0]):
        if slots[s] != cold:
            continue
        r = s // setup.per_rank
        if holds[r, hot] or (node >= 0 and r // setup.ranks_per_node != node):
            continue
        if not home[r, hot] and 0 <= setup.budget <= spent:
            continue
        # A rank that still has the weights wins against one that is a little cooler.
        cost = load[r] * (0.98 if home[r, hot] else 1.0)
        if cost < best_load:
            best, best_load = s, cost
    return best


@njit(nogil=True)
def _rate(e, weight, copies, ranks, cold, hot):
    """cold[e]: a replica's weight with one fewer; hot[e]: as it is, where one more may come."""
    cold[e] = weight[e] / (copies[e] - 1) if copies[e] > 1 else np.inf
    hot[e] = weight[e] / copies[e] if copies[e] < ranks else -np.inf


@njit(nogil=True)
def exchange(st, pairs, variance, setup):
    """Replica exchange: cold experts' spare slots go to the experts with the hottest replicas.

    An expert's weight is its forecast plus one standard deviation. Changes `slots`, `copies` and
    `holds` in place.
    """
    slots, copies, holds, home = st.slots, st.copies, st.holds, st.home
    weight = pairs + np.sqrt(variance)
    colds, hots = np.empty_like(weight), np.empty_like(weight)
    for e in range(weight.shape[0]):
        _rate(e, weight, copies, setup.ranks, colds, hots)
    load = np.zeros(setup.ranks)
    for s in range(slots.shape[0]):
        load[s // setup.per_rank] += weight[slots[s]] / copies[slots[s]]
    spent = 0
    for _ in range(slots.shape[0]):
        cold, hot = colds.argmin(), hots.argmax()
        cold_key, hot_key = colds[cold], hots[hot]
        if cold_key == np.inf or hot_key <= cold_key * setup.replica_margin:
            return
        slot = _spare_slot(cold, hot, st, load, setup, spent)
        if slot < 0:
            return
        rank = slot // setup.per_rank
        for r in range(setup.ranks):
            load[r] -= weight[cold] / copies[cold] if holds[r, cold] else 0.0
            load[r] -= hot_key if holds[r, hot] else 0.0
        slots[slot] = hot
        holds[rank, cold], holds[rank, hot] = 0, 1
        copies[cold] -= 1
        copies[hot] += 1
        spent += 0 if home[rank, hot] else 1
        for r in range(setup.ranks):
            load[r] += cold_key if holds[r, cold] else 0.0
            load[r] += weight[hot] / copies[hot] if holds[r, hot] else 0.0
        _rate(cold, weight, copies, setup.ranks, colds, hots)
        _rate(hot, weight, copies, setup.ranks, colds, hots)
