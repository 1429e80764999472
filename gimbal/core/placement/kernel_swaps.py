"""Which rank holds which replica: best-improvement swaps; compiled as a part of `kernel`.

The load term is smoothed: with rank times t_r and variances v_r the search lowers
``(1/theta) log sum_r exp(theta t_r + theta^2 v_r / 2)``. It bounds the expected maximum from above
(theta from the forecast's spread) or, as theta grows, becomes the maximum itself. A swap changes
two terms of a sum, so its exact effect costs a few multiplications, there is no plateau, and
improving a rank that is merely warm is worth little. ``log(1 + x) <= x`` makes the accepted
(linear) gain a lower bound of the true one.

Tables have a row per slot-in-rank and a column per rank where ranks are many, and the other way
round where they are few, so that the inner loops are long enough to vectorize.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator"

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numba import njit

_LN2_HIGH = 0.6931471803691238
_LN2_LOW = 1.9082149292705877e-10
_STAGE_FACTOR = 5.0
"""How much sharper each stage of the descent is than the one before."""


class Table(NamedTuple):
    """What swaps look up, [rows, columns]: see the module's docstring for which is which."""

    slots: Any  # expert
    came: Any  # factor on a rank's heat when the expert comes
    warm: Any  # heat of the slot's rank times the factor when its expert goes
    value: Any  # cost of the expert there
    base: Any  # scratch: what taking the slot's expert to the visited rank changes
    least: Any  # [columns] scratch
    move: Any  # [ranks] scratch
    row: Any  # [experts] scratch
    came_of: Any  # [experts] factor on a rank's heat when the expert comes
    gone_of: Any  # [experts] and when it goes
    heat: Any  # [ranks] exp(theta * time + ...), relative to the first hottest


@njit(nogil=True)
def exp_exact(x):
    """exp(x) from additions and multiplications only: the same bits on every IEEE machine."""
    if x < -690.0:
        return 0.0
    x = min(x, 690.0)
    n = math.floor(x * 1.4426950408889634 + 0.5)
    return math.ldexp(_series((x - n * _LN2_HIGH) - n * _LN2_LOW), int(n))


@njit(nogil=True)
def _series(r):
    """exp(r) for |r| <= ln(2)/2, Taylor's series to r^13."""
    s = 1.6059043836821613e-10
    s = s * r + 2.08767569878681e-09
    s = s * r + 2.505210838544172e-08
    s = s * r + 2.755731922398589e-07
    s = s * r + 2.7557319223985893e-06
    s = s * r + 2.48015873015873e-05
    s = s * r + 0.0001984126984126984
    s = s * r + 0.001388888888888889
    s = s * r + 0.008333333333333333
    s = s * r + 0.041666666666666664
    s = s * r + 0.16666666666666666
    s = s * r + 0.5
    s = s * r + 1.0
    return s * r + 1.0


@njit(nogil=True)
def _exp_all(x, out):
    """out = exp(x), element by element as `exp_exact`, but vectorized."""
    scale = np.empty(x.shape[0], dtype=np.int64)
    for i in range(x.shape[0]):
        v = x[i] if x[i] > -690.0 else -690.0
        v = v if v < 690.0 else 690.0
        n = math.floor(v * 1.4426950408889634 + 0.5)
        out[i] = _series((v - n * _LN2_HIGH) - n * _LN2_LOW)
        scale[i] = (np.int64(n) + 1023) << 52  # the bits of 2.0**n
    power = scale.view(np.float64)
    for i in range(x.shape[0]):
        out[i] *= power[i]


@njit(nogil=True)
def _new_table(ranks, per_rank, experts, by_rank):
    rows, columns = (per_rank, ranks) if by_rank else (ranks, per_rank)
    return Table(
        np.empty((rows, columns), dtype=np.int32),
        np.empty((rows, columns)),
        np.empty((rows, columns)),
        np.empty((rows, columns)),
        np.empty((rows, columns)),
        np.empty(columns),
        np.empty(ranks),
        np.empty(experts),
        np.empty(experts),
        np.empty(experts),
        np.empty(ranks),
    )


@njit(nogil=True)
def _refresh(t, st, rank, per_rank, by_rank):
    """Recomputes what the table keeps per slot of one rank."""
    for k in range(per_rank):
        a, b = (k, rank) if by_rank else (rank, k)
        e = st.slots[rank * per_rank + k]
        t.slots[a, b] = e
        t.came[a, b] = t.came_of[e]
        t.warm[a, b] = t.heat[rank] * t.gone_of[e]
        t.value[a, b] = st.value[rank, e]


@njit(nogil=True)
def _targets(h, t, st, price, setup, by_rank):
    """Fills `base`: what each slot's expert changes when it goes to rank h, warmth aside."""
    rows, columns = t.slots.shape
    t.row[:] = st.value[h]
    for s in range(h * setup.per_rank, (h + 1) * setup.per_rank):
        t.row[st.slots[s]] = np.inf
    own = price * t.heat[h]
    for a in range(rows):
        slots, base, value = t.slots[a], t.base[a], t.value[a]
        if by_rank:
            for b in range(columns):
                base[b] = t.row[slots[b]] - value[b] - price * t.heat[b] - own
        else:
            heat = price * t.heat[a] + own
            for b in range(columns):
                base[b] = t.row[slots[b]] - value[b] - heat
    if setup.node_locked:
        first = h - h % setup.ranks_per_node
        last = min(first + setup.ranks_per_node, setup.ranks)
        if by_rank:
            t.base[:, :first] = np.inf
            t.base[:, last:] = np.inf
        else:
            t.base[:first] = np.inf
            t.base[last:] = np.inf


# What runs once per slot takes single arrays: passing a NamedTuple of them costs 0.1 us a call.


@njit(nogil=True)
def _moves(e, away, stay, copies, holds, move):
    """Fills `move`: what expert e changes when it goes to each rank, heat aside."""
    for r in range(move.shape[0]):
        move[r] = away[r] - stay
    if copies > 1:
        for r in range(move.shape[0]):
            if holds[r, e]:
                move[r] = np.inf


@njit(nogil=True)
def _lower_by_rank(base_, came_, warm_, move, least, cool, warm):
    """least = min(least, change of swapping one expert with each slot), by column (a rank)."""
    # No index is tracked here so that the loop vectorizes.
    for a in range(base_.shape[0]):
        base, came, heat = base_[a], came_[a], warm_[a]
        for b in range(least.shape[0]):
            delta = base[b] + move[b] + warm * heat[b] + cool * came[b]
            least[b] = delta if delta < least[b] else least[b]


@njit(nogil=True)
def _lower_by_slot(base_, came_, warm_, move, least, cool, warm):
    """The same where a row is a rank."""
    for a in range(base_.shape[0]):
        base, came, heat, here = base_[a], came_[a], warm_[a], move[a]
        for b in range(least.shape[0]):
            delta = base[b] + here + warm * heat[b] + cool * came[b]
            least[b] = delta if delta < least[b] else least[b]


@njit(nogil=True)
def _best_swap(h, t, st, price, setup, tolerance, by_rank):
    """Best exchange of a slot of rank h for one elsewhere: (slot of h, other slot), or (-1, -1)."""
    per_rank = setup.per_rank
    own = price * t.heat[h]
    _targets(h, t, st, price, setup, by_rank)
    slots, copies, holds, value, value_of = st.slots, st.copies, st.holds, st.value, st.value_of
    base, came, warm, move, least = t.base, t.came, t.warm, t.move, t.least
    least[:] = np.inf
    for s in range(h * per_rank, (h + 1) * per_rank):
        e = slots[s]
        _moves(e, value_of[e], np.float64(value[h, e]), copies[e], holds, move)
        cooler, warmer = own * t.gone_of[e], price * t.came_of[e]
        if by_rank:
            _lower_by_rank(base, came, warm, move, least, cooler, warmer)
        else:
            _lower_by_slot(base, came, warm, move, least, cooler, warmer)
    column, best = -1, -tolerance
    for b in range(least.shape[0]):
        if least[b] < best:
            column, best = b, least[b]
    if column < 0:
        return -1, -1
    return _find(h, column, t, st, price, per_rank, by_rank)


@njit(nogil=True)
def _find(h, column, t, st, price, per_rank, by_rank):
    """The pair of slots whose swap gave the column's least change."""
    own = price * t.heat[h]
    mine, other, best = -1, -1, np.inf
    for s in range(h * per_rank, (h + 1) * per_rank):
        e = st.slots[s]
        cool, warm, stay = own * t.gone_of[e], price * t.came_of[e], np.float64(st.value[h, e])
        for a in range(t.slots.shape[0]):
            rank, k = (column, a) if by_rank else (a, column)
            if st.copies[e] > 1 and st.holds[rank, e]:
                continue
            move = st.value_of[e, rank] - stay
            delta = t.base[a, column] + move + warm * t.warm[a, column] + cool * t.came[a, column]
            if delta < best:
                mine, other, best = s, rank * per_rank + k, delta
    return mine, other


@njit(nogil=True)
def descend(st, sharpest, theta, setup):
    """Swaps in stages, each sharper than the last, up to `sharpest`."""
    by_rank = setup.ranks >= setup.per_rank
    experts = st.unit.shape[0]
    t = _new_table(setup.ranks, setup.per_rank, experts, by_rank)
    while True:
        exponent = theta * st.unit + 0.5 * theta * theta * st.unit_var
        _exp_all(exponent, t.came_of)
        for e in range(experts):
            t.gone_of[e] = 1.0 / t.came_of[e]
        _stage(t, st, theta, setup, by_rank)
        if theta >= sharpest:
            return
        theta = min(sharpest, theta * _STAGE_FACTOR)


@njit(nogil=True)
def _hottest(heat, stuck):
    h, most = -1, -1.0
    for r in range(heat.shape[0]):
        if heat[r] > most and not stuck[r]:
            h, most = r, heat[r]
    return h


@njit(nogil=True)
def _stage(t, st, theta, setup, by_rank):
    """Best-improvement swaps from the hottest rank down until no rank visited can improve."""
    ranks, per_rank, home = setup.ranks, setup.per_rank, st.home
    top = st.time.max()
    tolerance = 1e-6 * setup.alpha * st.time.sum() / ranks
    spent, failures = 0, 0
    for r in range(ranks):
        t.heat[r] = exp_exact(theta * (st.time[r] - top) + 0.5 * theta * theta * st.var[r])
        _refresh(t, st, r, per_rank, by_rank)
        for s in range(r * per_rank, (r + 1) * per_rank):
            spent += 1 - home[r, st.slots[s]]
    total = t.heat.sum()
    stuck = np.zeros(ranks, dtype=np.uint8)
    for _ in range(setup.visits):
        h = _hottest(t.heat, stuck)
        # No heat is left when every rank fell far below the first hottest: a finer stage goes on.
        if h < 0 or failures >= setup.patience or total <= 1e-280:
            return
        price = setup.alpha / (theta * total)
        i, j = _best_swap(h, t, st, price, setup, tolerance, by_rank)
        more = 0
        if i >= 0:
            c, e, f = j // per_rank, st.slots[i], st.slots[j]
            more = home[h, e] + home[c, f] - home[c, e] - home[h, f]
        if i < 0 or (more > 0 and 0 <= setup.budget < spent + more):
            stuck[h] = 1
            failures += 1
            continue
        spent += more
        failures = 0
        _swap(i, j, t, st, theta, top, per_rank, by_rank)
        stuck[h], stuck[c] = 0, 0
        total = t.heat.sum()


@njit(nogil=True)
def _swap(i, j, t, st, theta, top, per_rank, by_rank):
    """Exchanges the experts of two slots on different ranks."""
    h, c, e, f = i // per_rank, j // per_rank, st.slots[i], st.slots[j]
    st.slots[i], st.slots[j] = f, e
    st.holds[h, e], st.holds[c, f], st.holds[h, f], st.holds[c, e] = 0, 0, 1, 1
    for r, sign in ((h, 1.0), (c, -1.0)):
        st.time[r] += sign * (st.unit[f] - st.unit[e])
        st.var[r] += sign * (st.unit_var[f] - st.unit_var[e])
        t.heat[r] = exp_exact(theta * (st.time[r] - top) + 0.5 * theta * theta * st.var[r])
        _refresh(t, st, r, per_rank, by_rank)
