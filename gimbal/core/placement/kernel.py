"""The search over one layer, compiled; `heuristic` prepares its inputs and judges its output.

Bit-for-bit deterministic: no clock, no randomness, no fast-math, sums in a fixed order, and an
exponential built from IEEE-exact operations, because the math libraries of two hosts may differ
in the last bit. Layers are independent, so running them in parallel changes nothing.

The load term is smoothed: with rank times t_r and variances v_r the search lowers
``(1/theta) log sum_r exp(theta t_r + theta^2 v_r / 2)``. It bounds the expected maximum from above
(theta from the forecast's spread) or, as theta grows, becomes the maximum itself. A swap changes
two terms of a sum, so its exact effect costs a few multiplications, there is no plateau, and
improving a rank that is merely warm is worth little. ``log(1 + x) <= x`` makes the accepted
(linear) gain a lower bound of the true one.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numba import njit, prange

from gimbal.core.contracts import FloatArray

_LN2_HIGH = 0.6931471803691238
_LN2_LOW = 1.9082149292705877e-10
_SURELY_ACTIVE = -50.0
"""Log-probabilities of idling below this count as never."""


class Setup(NamedTuple):
    """What all layers share; prices are microseconds per step, multipliers included."""

    ranks: int
    per_rank: int  # slots
    ranks_per_source: int
    ranks_per_node: int
    node_locked: bool  # replicas must stay in their node
    budget: int  # experts a layer may receive; negative is no limit
    pairs_scale: float  # from counts of the window to pairs per step
    same_rank_us: float  # per pair sent to each tier
    same_node_us: float
    other_node_us: float
    receive_us: float  # per received expert
    alpha: float
    sharpness: float  # theta times the longest replica, where the forecast is certain
    replica_margin: float  # a spare slot changes hands when the hot replica is so much hotter
    first_stage: float  # first theta times the mean rank
    visits: int  # bound of rank visits per stage
    patience: int  # ranks in a row that cannot improve before a stage ends


class Load(NamedTuple):
    """Per layer and expert."""

    pairs: FloatArray  # [layers, experts] per step
    log_idle: FloatArray  # [layers, experts] log probability that no token of a step comes
    factor: FloatArray  # [layers, experts] forecast over counts
    variance: FloatArray  # [layers, experts] of pairs per step
    us_per_pair: FloatArray  # [layers]
    us_per_active: FloatArray  # [layers]
    theta: FloatArray  # [layers], 0 where nothing is uncertain


@njit(cache=True, nogil=True)
def exp_exact(x):
    """exp(x) from additions and multiplications only: the same bits on every IEEE machine."""
    if x < -690.0:
        return 0.0
    x = min(x, 690.0)
    n = math.floor(x * 1.4426950408889634 + 0.5)
    r = (x - n * _LN2_HIGH) - n * _LN2_LOW
    s = 1.0
    for k in range(13, 0, -1):
        s = 1.0 + r * s / k
    return math.ldexp(s, int(n))


@njit(cache=True, nogil=True)
def _drop_doubles(slots, copies, holds, pairs, ranks, per_rank):
    """Replaces the second copy of an expert on one rank by the hottest expert missing there."""
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


@njit(cache=True, nogil=True)
def _spare_slot(cold, hot, slots, holds, home, load, setup, spent):
    """Slot of `cold` on the coolest rank that may take `hot`, or -1."""
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


@njit(cache=True, nogil=True)
def _replicate(slots, copies, holds, home, pairs, sd, setup):
    """Replica exchange: cold experts' spare slots go to the experts with the hottest replicas.

    An expert's weight is its forecast plus one standard deviation. Changes `slots`, `copies` and
    `holds` in place.
    """
    weight = pairs + sd
    load = np.zeros(setup.ranks)
    for s in range(slots.shape[0]):
        load[s // setup.per_rank] += weight[slots[s]] / copies[slots[s]]
    spent = 0
    for _ in range(slots.shape[0]):
        cold, cold_key = -1, np.inf
        for e in range(weight.shape[0]):
            if copies[e] > 1 and weight[e] / (copies[e] - 1) < cold_key:
                cold, cold_key = e, weight[e] / (copies[e] - 1)
        hot, hot_key = -1, cold_key * setup.replica_margin
        for e in range(weight.shape[0]):
            if copies[e] < setup.ranks and weight[e] / copies[e] > hot_key:
                hot, hot_key = e, weight[e] / copies[e]
        if cold < 0 or hot < 0:
            return
        slot = _spare_slot(cold, hot, slots, holds, home, load, setup, spent)
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


@njit(cache=True, nogil=True)
def _send_costs(counts, layer, factor, copies, setup, cost):
    """cost[r, e]: microseconds per step of sending one replica's share of pairs to rank r."""
    experts = copies.shape[0]
    per_node = setup.ranks_per_node
    far, to_node, to_own = np.zeros(experts), np.empty(experts), np.empty(experts)
    for s in range(counts.shape[0]):
        for e in range(experts):
            far[e] += counts[s, layer, e]
    for e in range(experts):
        unit = setup.pairs_scale * factor[e] / copies[e]
        far[e] *= setup.other_node_us * unit
        to_node[e] = (setup.other_node_us - setup.same_node_us) * unit
        to_own[e] = (setup.same_node_us - setup.same_rank_us) * unit
    near = np.zeros(experts)
    for r in range(setup.ranks):
        if r % per_node == 0:
            near[:] = 0.0
            last = (min(r + per_node, setup.ranks) - 1) // setup.ranks_per_source
            for s in range(r // setup.ranks_per_source, last + 1):
                for e in range(experts):
                    near[e] += counts[s, layer, e]
        own = counts[r // setup.ranks_per_source, layer]
        for e in range(experts):
            # Rounding may leave a trace below zero.
            cost[r, e] = max(0.0, far[e] - to_node[e] * near[e] - to_own[e] * own[e])


class Search(NamedTuple):
    """One layer's state during the descent. Rows of `work` repeat what swaps would look up."""

    slots: Any  # [slots] expert
    copies: Any  # [experts]
    holds: Any  # [ranks, experts] 1 where the rank has a replica
    home: Any  # [ranks, experts] 1 where it had one in the placement in force
    value: Any  # [ranks, experts] cost of a replica there, load aside
    value_of: Any  # [experts, ranks] the same, transposed
    factor: Any  # [2, experts] on a rank's heat when the expert comes, and when it goes
    heat: Any  # [ranks] exp(theta * time + ...), relative to the first hottest
    work: Any  # [9, slots] factor when it comes and goes, value, heat; five rows of scratch
    row: Any  # [experts] scratch


@njit(cache=True, nogil=True)
def _refresh(slots, factor, value, heat, work, rank, per_rank):
    """Recomputes what `work` keeps per slot of one rank."""
    for j in range(rank * per_rank, (rank + 1) * per_rank):
        f = slots[j]
        work[0, j] = factor[0, f]
        work[1, j] = factor[1, f]
        work[2, j] = value[rank, f]
        work[3, j] = heat[rank]


@njit(cache=True, nogil=True)
def _targets(slots, row, work, price, heat_h):
    """What taking the expert of slot j to rank h changes, apart from what goes there instead."""
    for j in range(slots.shape[0]):
        heat = price * work[3, j]
        work[4, j] = row[slots[j]] - work[2, j] - heat - heat_h
        work[5, j] = heat * work[1, j]
        work[6, j] = heat_h * work[0, j]
        work[7, j] = np.inf


@njit(cache=True, nogil=True)
def _source(away, stay, column, per_rank):
    """column[j]: what moving one expert from its rank to slot j's rank changes."""
    j = 0
    for c in range(away.shape[0]):
        move = away[c] - stay
        for _ in range(per_rank):
            column[j] = move
            j += 1


@njit(cache=True, nogil=True)
def _lower(least, base, cool, warm, column, grow, shrink):
    """least = min(least, cost change of swapping one expert with each slot)."""
    # No index is tracked here so that the loop vectorizes.
    for j in range(least.shape[0]):
        delta = base[j] + column[j] + shrink * warm[j] + grow * cool[j]
        least[j] = delta if delta < least[j] else least[j]


@njit(cache=True, nogil=True)
def _best_swap(h, st, price, setup, tolerance):
    """Best exchange of a slot of rank h for one elsewhere: (slot of h, other slot), or (-1, -1)."""
    per_rank = setup.per_rank
    slots, copies, value, value_of = st.slots, st.copies, st.value, st.value_of
    factor, work, row = st.factor, st.work, st.row
    base, cool, warm, least, column = work[4], work[5], work[6], work[7], work[8]
    row[:] = value[h]
    for i in range(h * per_rank, (h + 1) * per_rank):
        row[slots[i]] = np.inf
    _targets(slots, row, work, price, price * st.heat[h])
    if setup.node_locked:
        first = h - h % setup.ranks_per_node
        base[: first * per_rank] = np.inf
        base[(first + setup.ranks_per_node) * per_rank :] = np.inf
    for i in range(h * per_rank, (h + 1) * per_rank):
        e = slots[i]
        _source(value_of[e], value[h, e], column, per_rank)
        if copies[e] > 1:
            for j in range(slots.shape[0]):
                if slots[j] == e:
                    c = j // per_rank
                    column[c * per_rank : (c + 1) * per_rank] = np.inf
        _lower(least, base, cool, warm, column, factor[0, e], factor[1, e])
    best_j, best = -1, -tolerance
    for j in range(slots.shape[0]):
        if least[j] < best:
            best_j, best = j, least[j]
    if best_j < 0:
        return -1, -1
    c = best_j // per_rank
    best_i, best = -1, np.inf
    for i in range(h * per_rank, (h + 1) * per_rank):
        e = slots[i]
        if copies[e] > 1 and st.holds[c, e]:
            continue
        delta = value[c, e] - value[h, e]
        delta += factor[1, e] * warm[best_j] + factor[0, e] * cool[best_j]
        if delta < best:
            best_i, best = i, delta
    return best_i, best_j


@njit(cache=True, nogil=True)
def _descend(st, time, var, unit, unit_var, theta, setup):
    """Best-improvement swaps from the hottest rank down until no rank visited can improve."""
    ranks, per_rank = setup.ranks, setup.per_rank
    slots, holds, home, heat = st.slots, st.holds, st.home, st.heat
    factor, value, work = st.factor, st.value, st.work
    for e in range(unit.shape[0]):
        factor[0, e] = exp_exact(theta * unit[e] + 0.5 * theta * theta * unit_var[e])
        factor[1, e] = 1.0 / factor[0, e]
    top = time.max()
    tolerance = 1e-6 * setup.alpha * time.sum() / ranks
    spent = 0
    for r in range(ranks):
        heat[r] = exp_exact(theta * (time[r] - top) + 0.5 * theta * theta * var[r])
        _refresh(slots, factor, value, heat, work, r, per_rank)
        for i in range(r * per_rank, (r + 1) * per_rank):
            spent += 1 - home[r, slots[i]]
    total = heat.sum()
    stuck = np.zeros(ranks, dtype=np.uint8)
    failures = 0
    for _ in range(setup.visits):
        h = -1
        for r in range(ranks):
            if not stuck[r] and (h < 0 or heat[r] > heat[h]):
                h = r
        # No heat is left when every rank fell far below the first hottest: a finer stage goes on.
        if h < 0 or failures >= setup.patience or total <= 1e-280:
            return
        i, j = _best_swap(h, st, setup.alpha / (theta * total), setup, tolerance)
        more = 0
        if i >= 0:
            c, e, f = j // per_rank, slots[i], slots[j]
            more = home[h, e] + home[c, f] - home[c, e] - home[h, f]
        if i < 0 or (more > 0 and 0 <= setup.budget < spent + more):
            stuck[h] = 1
            failures += 1
            continue
        spent += more
        failures = 0
        slots[i], slots[j] = f, e
        holds[h, e], holds[c, f], holds[h, f], holds[c, e] = 0, 0, 1, 1
        total -= heat[h] + heat[c]
        for r, sign in ((h, 1.0), (c, -1.0)):
            time[r] += sign * (unit[f] - unit[e])
            var[r] += sign * (unit_var[f] - unit_var[e])
            heat[r] = exp_exact(theta * (time[r] - top) + 0.5 * theta * theta * var[r])
            stuck[r] = 0
            _refresh(slots, factor, value, heat, work, r, per_rank)
        total += heat[h] + heat[c]


@njit(cache=True, nogil=True)
def _keep_survivors(slots, current, ranks, per_rank, out):
    """Writes `slots` to `out` with every expert that stays on its rank in the slot it had."""
    taken = np.zeros(per_rank, dtype=np.uint8)
    placed = np.zeros(per_rank, dtype=np.uint8)
    for r in range(ranks):
        base = r * per_rank
        taken[:] = 0
        placed[:] = 0
        for a in range(per_rank):
            for b in range(per_rank):
                if not taken[b] and current[base + b] == slots[base + a]:
                    out[base + b] = slots[base + a]
                    taken[b], placed[a] = 1, 1
                    break
        b = 0
        for a in range(per_rank):
            if placed[a]:
                continue
            while taken[b]:
                b += 1
            out[base + b] = slots[base + a]
            taken[b] = 1


@njit(cache=True, nogil=True)
def _replica_times(load, layer, copies, unit, unit_var):
    """Microseconds per step of one replica of each expert, and its variance."""
    us_pair, us_active = load.us_per_pair[layer], load.us_per_active[layer]
    for e in range(copies.shape[0]):
        log_idle = load.log_idle[layer, e] / copies[e]
        idle = 0.0 if log_idle <= _SURELY_ACTIVE else exp_exact(log_idle)
        unit[e] = us_pair * load.pairs[layer, e] / copies[e] + us_active * (1.0 - idle)
        unit_var[e] = us_pair * us_pair * load.variance[layer, e] / (copies[e] * copies[e])


@njit(cache=True, nogil=True)
def solve_layer(counts, layer, current, start, load, setup, out, comm):
    """Plans one layer from `start` [slots] into `out` [slots].

    `comm` [3] receives the communication cost of `current`, of the plan, and its lower bound.
    """
    ranks, per_rank = setup.ranks, setup.per_rank
    experts, slots_n = load.pairs.shape[1], current.shape[0]
    slots = start.copy()
    copies, old_copies = np.zeros(experts, dtype=np.int64), np.zeros(experts, dtype=np.int64)
    home = np.zeros((ranks, experts), dtype=np.int8)
    holds = np.zeros((ranks, experts), dtype=np.int8)
    for s in range(slots_n):
        copies[slots[s]] += 1
        old_copies[current[s]] += 1
        home[s // per_rank, current[s]] = 1
        holds[s // per_rank, slots[s]] = 1
    if slots_n > experts:
        _drop_doubles(slots, copies, holds, load.pairs[layer], ranks, per_rank)
        sd = np.sqrt(load.variance[layer])
        _replicate(slots, copies, holds, home, load.pairs[layer], sd, setup)
    value = np.zeros((ranks, experts))
    if max(setup.same_rank_us, setup.same_node_us, setup.other_node_us) > 0.0:
        _send_costs(counts, layer, load.factor[layer], copies, setup, value)
        least = value[0].copy()
        for r in range(1, ranks):
            for e in range(experts):
                least[e] = value[r, e] if value[r, e] < least[e] else least[e]
        for e in range(experts):
            comm[2] += least[e] * copies[e]
    for s in range(slots_n):
        e = current[s]
        comm[0] += value[s // per_rank, e] * copies[e] / old_copies[e]
    value_of = np.empty((experts, ranks))
    for first in range(0, experts, 16):  # in blocks that stay in the cache
        for r in range(ranks):
            for e in range(first, min(first + 16, experts)):
                value[r, e] += setup.receive_us * (1 - home[r, e])
                value_of[e, r] = value[r, e]
    unit, unit_var = np.empty(experts), np.empty(experts)
    _replica_times(load, layer, copies, unit, unit_var)
    time, var = np.zeros(ranks), np.zeros(ranks)
    for s in range(slots_n):
        time[s // per_rank] += unit[slots[s]]
        var[s // per_rank] += unit_var[slots[s]]
    mean = time.sum() / ranks
    if mean > 0.0:
        last = load.theta[layer]
        if last <= 0.0:
            last = setup.sharpness / max(unit.max(), 1e-9)
        theta = min(last, setup.first_stage / mean)
        st = Search(
            slots, copies, holds, home, value, value_of, np.empty((2, experts)), np.empty(ranks),
            np.empty((9, slots_n)), np.empty(experts),
        )  # fmt: skip
        while True:
            _descend(st, time, var, unit, unit_var, theta, setup)
            if theta >= last:
                break
            theta = min(last, theta * 5.0)
    for s in range(slots_n):
        r, e = s // per_rank, slots[s]
        comm[1] += value[r, e] - setup.receive_us * (1 - home[r, e])
    _keep_survivors(slots, current, ranks, per_rank, out)


@njit(cache=True, nogil=True)
def solve_serial(counts, current, start, load, setup, out, comm):
    """All layers, one after the other."""
    for n in range(current.shape[0]):
        solve_layer(counts, n, current[n], start[n], load, setup, out[n], comm[n])


@njit(cache=True, nogil=True, parallel=True)
def solve_parallel(counts, current, start, load, setup, out, comm):
    """All layers over numba's threads; same result as `solve_serial`."""
    for n in prange(current.shape[0]):
        solve_layer(counts, n, current[n], start[n], load, setup, out[n], comm[n])
