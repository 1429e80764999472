"""The search over one layer, compiled; `heuristic` prepares its inputs and judges its output.

Bit-for-bit deterministic: no clock, no randomness, no fast-math, sums in a fixed order, and an
exponential built from IEEE-exact operations, because the math libraries of two hosts may differ
in the last bit. Layers are independent.

`kernel_replicas` says how many replicas experts have, `kernel_swaps` where they live; here are the
data they share, what sending costs, and the exact price of a layer. Everything is compiled as one
unit and cached under a digest of these sources (`compiled`).
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator"

from __future__ import annotations

import hashlib
import math
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numba import njit

from gimbal.core.compiled import njit as cached_njit
from gimbal.core.contracts import FloatArray
from gimbal.core.cost import step
from gimbal.core.placement import kernel_replicas, kernel_swaps
from gimbal.core.placement.kernel_swaps import exp_exact

_SURELY_ACTIVE = -50.0
"""Log-probabilities of idling below this count as never."""

LOAD, COMM, RECEIVED, MOVED, BALANCE, LOCAL = range(6)
"""Columns of a layer's facts: costs in microseconds per step without alpha, then counts."""


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
    known_sources: bool  # counts have a row per source, not one for all


class Load(NamedTuple):
    """Per layer and expert."""

    pairs: FloatArray  # [layers, experts] per step
    active: FloatArray  # [layers, experts] probability that a step activates the expert
    log_idle: FloatArray  # [layers, experts] log of its complement, without the last bits
    factor: FloatArray  # [layers, experts] forecast over counts
    variance: FloatArray  # [layers, experts] of pairs per step
    us_per_pair: FloatArray  # [layers]
    us_per_active: FloatArray  # [layers]
    theta: FloatArray  # [layers], 0 where nothing is uncertain
    moe: FloatArray  # [6] arguments of `step.rank_moe_us`, then top_k
    measured: FloatArray  # [layers, experts] counts over all sources


class Layer(NamedTuple):
    """One layer's state, allocated once and used for all layers."""

    slots: Any  # [slots] expert, rank-major
    copies: Any  # [experts]
    holds: Any  # [ranks, experts] 1 where the rank has a replica
    home: Any  # [ranks, experts] 1 where it had one in the placement in force
    near: Any  # [nodes, experts] counts of the node's own sources
    value: Any  # [ranks, experts] cost of a replica there, load aside
    value_of: Any  # [experts, ranks] the same, transposed
    unit: Any  # [experts] microseconds per step of one replica
    unit_var: Any  # [experts] its variance
    time: Any  # [ranks]
    var: Any  # [ranks]


rank_moe_us = njit(nogil=True)(step.rank_moe_us)


@njit(nogil=True)
def _new_layer(ranks, per_rank, experts, per_node):
    nodes = (ranks + per_node - 1) // per_node
    return Layer(
        np.empty(ranks * per_rank, dtype=np.int32),
        np.empty(experts, dtype=np.int64),
        np.empty((ranks, experts), dtype=np.int8),
        np.empty((ranks, experts), dtype=np.int8),
        np.empty((nodes, experts)),
        np.empty((ranks, experts), dtype=np.float32),
        np.empty((experts, ranks), dtype=np.float32),
        np.empty(experts),
        np.empty(experts),
        np.empty(ranks),
        np.empty(ranks),
    )


@njit(nogil=True)
def _begin(st, current, start, per_rank):
    """Fills slots, copies, holds and home; returns True when a rank holds an expert twice."""
    doubles = False
    st.copies[:] = 0
    st.home[:] = 0
    st.holds[:] = 0
    for s in range(current.shape[0]):
        e = start[s]
        st.slots[s] = e
        st.copies[e] += 1
        st.home[s // per_rank, current[s]] = 1
        doubles |= st.holds[s // per_rank, e] == 1
        st.holds[s // per_rank, e] = 1
    return doubles


@njit(nogil=True)
def _near(counts, layer, st, setup):
    """Fills `near`."""
    st.near[:] = 0.0
    for s in range(counts.shape[0]):
        node = s * setup.ranks_per_source // setup.ranks_per_node
        for e in range(counts.shape[2]):
            st.near[node, e] += counts[s, layer, e]


@njit(nogil=True)
def _send_costs(counts, layer, load, st, setup):
    """Fills `value` with what sending one replica's share of pairs to a rank costs.

    Returns the least that all communication can cost.
    """
    experts, scale = st.copies.shape[0], setup.pairs_scale
    far, to_node, to_own = np.empty(experts), np.empty(experts), np.empty(experts)
    least = np.full(experts, np.inf)
    for e in range(experts):
        unit = scale * load.factor[layer, e] / st.copies[e]
        far[e] = setup.other_node_us * unit * load.measured[layer, e]
        to_node[e] = (setup.other_node_us - setup.same_node_us) * unit
        to_own[e] = (setup.same_node_us - setup.same_rank_us) * unit
    for r in range(setup.ranks):
        own = counts[r // setup.ranks_per_source, layer]
        near, value = st.near[r // setup.ranks_per_node], st.value[r]
        for e in range(experts):
            # Rounding may leave a trace below zero.
            cost = far[e] - to_node[e] * near[e] - to_own[e] * own[e]
            cost = cost if cost > 0.0 else 0.0
            least[e] = cost if cost < least[e] else least[e]
            value[e] = cost
    floor = 0.0
    for e in range(experts):
        floor += least[e] * st.copies[e]
    return floor


@njit(nogil=True)
def _add_receiving(st, receive_us):
    """Adds what receiving an expert costs to `value`, and fills its transpose."""
    ranks, experts = st.value.shape
    price = np.float32(receive_us)
    for r in range(ranks):
        value, home = st.value[r], st.home[r]
        for e in range(experts):
            value[e] += price * np.float32(1 - home[e])
    for first in range(0, experts, 16):  # in blocks that stay in the cache
        for r in range(ranks):
            for e in range(first, min(first + 16, experts)):
                st.value_of[e, r] = st.value[r, e]


@njit(nogil=True)
def _replica_times(load, layer, st, per_rank):
    """Fills what one replica of each expert, and each rank, takes, and the variance of both."""
    us_pair, us_active = load.us_per_pair[layer], load.us_per_active[layer]
    for e in range(st.copies.shape[0]):
        copies = st.copies[e]
        st.unit[e] = us_pair * load.pairs[layer, e] / copies
        st.unit_var[e] = us_pair * us_pair * load.variance[layer, e] / (copies * copies)
        if us_active > 0.0:
            log_idle = load.log_idle[layer, e] / copies
            idle = 0.0 if log_idle <= _SURELY_ACTIVE else exp_exact(log_idle)
            st.unit[e] += us_active * (1.0 - idle)
    st.time[:] = 0.0
    st.var[:] = 0.0
    for s in range(st.slots.shape[0]):
        st.time[s // per_rank] += st.unit[st.slots[s]]
        st.var[s // per_rank] += st.unit_var[st.slots[s]]


@njit(nogil=True)
def _keep_survivors(slots, current, ranks, per_rank, out, at):
    """Writes `slots` to `out` with every expert that stays on its rank in the slot it had.

    `at` [experts] is scratch.
    """
    for r in range(ranks):
        base = r * per_rank
        for s in range(base, base + per_rank):
            at[current[s]] = -1
            at[slots[s]] = -1
            out[s] = -1
        for s in range(base, base + per_rank):
            at[current[s]] = s
        for s in range(base, base + per_rank):
            if at[slots[s]] >= 0:
                out[at[slots[s]]] = slots[s]
        b = base
        for s in range(base, base + per_rank):
            if at[slots[s]] >= 0:
                continue
            while out[b] >= 0:
                b += 1
            out[b] = slots[s]


@njit(nogil=True)
def _rank_sums(slots, layer, load, copies, time, var, pairs, per_rank):
    """Fills [ranks] MoE time, its variance and measured pairs of a placement."""
    us_pair = load.us_per_pair[layer]
    total = 0.0
    for e in range(copies.shape[0]):
        total += load.pairs[layer, e]
    gathered = total / load.moe[5]
    for r in range(time.shape[0]):
        active, work, variance, measured = 0.0, 0.0, 0.0, 0.0
        for s in range(r * per_rank, (r + 1) * per_rank):
            e = slots[s]
            c = copies[e]
            work += load.pairs[layer, e] / c
            measured += load.measured[layer, e] / c
            variance += load.variance[layer, e] / (c * c)
            a = load.active[layer, e]
            active += a if c == 1 else 1.0 - (1.0 - a) ** (1.0 / c)
        m = load.moe
        time[r] = rank_moe_us(active, work, gathered, m[0], m[1], m[2], m[3], m[4])
        var[r] = us_pair * us_pair * variance
        pairs[r] = measured


@njit(nogil=True)
def _peak(time, var, theta):
    """The slowest rank, or the bound of its expectation where the forecast is uncertain."""
    worst = time.max()
    if theta <= 0.0:
        return worst
    high = -np.inf
    for r in range(time.shape[0]):
        x = theta * (time[r] - worst) + 0.5 * theta * theta * var[r]
        high = max(high, x)
    total = 0.0
    for r in range(time.shape[0]):
        x = theta * (time[r] - worst) + 0.5 * theta * theta * var[r]
        total += exp_exact(x - high)
    return worst + (high + math.log(total)) / theta


@njit(nogil=True)
def _price(counts, layer, slots, current, load, st, setup, facts):
    """Fills `facts` with the exact price and description of `slots`, receiving from `current`."""
    per_rank, experts = setup.per_rank, st.copies.shape[0]
    copies = np.zeros(experts, dtype=np.int64)
    for s in range(slots.shape[0]):
        copies[slots[s]] += 1
    pairs = np.empty(setup.ranks)
    _rank_sums(slots, layer, load, copies, st.time, st.var, pairs, per_rank)
    facts[LOAD] = _peak(st.time, st.var, load.theta[layer])
    facts[BALANCE] = pairs.sum() / setup.ranks / pairs.max() if pairs.max() > 0.0 else 1.0
    comm, received, moved, local = 0.0, 0, 0, 0.0
    scale = setup.pairs_scale
    for s in range(slots.shape[0]):
        r, e = s // per_rank, slots[s]
        received += 1 - st.home[r, e]
        moved += 1 if slots[s] != current[s] else 0
        if setup.known_sources:
            own = counts[r // setup.ranks_per_source, layer, e]
            near = st.near[r // setup.ranks_per_node, e]
            sent = setup.other_node_us * (load.measured[layer, e] - near)
            sent += setup.same_node_us * (near - own) + setup.same_rank_us * own
            comm += sent * scale * load.factor[layer, e] / copies[e]
            local += own / copies[e]
    facts[COMM], facts[RECEIVED], facts[MOVED], facts[LOCAL] = comm, received, moved, local


@njit(nogil=True)
def solve_layer(counts, layer, current, start, load, setup, st, out, facts, notes):
    """Plans one layer from `start` [slots] into `out` [slots].

    `facts` [2, 6] receives what `current` and the plan cost and do, `notes` [2] the least that
    communication can cost and whether a rank of `start` held an expert twice.
    """
    ranks, per_rank = setup.ranks, setup.per_rank
    doubles = _begin(st, current, start, per_rank)
    notes[0], notes[1] = 0.0, 1.0 if doubles else 0.0
    if doubles:
        kernel_replicas.drop_doubles(st, load.pairs[layer], ranks, per_rank)
    if current.shape[0] > st.copies.shape[0]:
        kernel_replicas.exchange(st, load.pairs[layer], load.variance[layer], setup)
    if setup.known_sources:
        _near(counts, layer, st, setup)
    if setup.other_node_us + setup.same_node_us + setup.same_rank_us > 0.0:
        notes[0] = _send_costs(counts, layer, load, st, setup)
    else:
        st.value[:] = 0.0
    _add_receiving(st, setup.receive_us)
    _replica_times(load, layer, st, per_rank)
    mean = st.time.sum() / ranks
    if mean > 0.0:
        last = load.theta[layer]
        if last <= 0.0:
            last = setup.sharpness / max(st.unit.max(), 1e-9)
        kernel_swaps.descend(st, last, min(last, setup.first_stage / mean), setup)
    _keep_survivors(st.slots, current, ranks, per_rank, out, st.copies)
    _price(counts, layer, current, current, load, st, setup, facts[0])
    _price(counts, layer, out, current, load, st, setup, facts[1])


def _sources_digest() -> str:
    """Of all that is compiled: numba's own cache sees changes of one file only."""
    modules = (__file__, kernel_replicas.__file__, kernel_swaps.__file__, step.__file__)
    return hashlib.sha256(b"".join(Path(str(m)).read_bytes() for m in modules)).hexdigest()


@cache
def compiled() -> Any:
    """``solve(counts, current, start, load, setup, out, facts, notes)`` over all layers."""
    digest = _sources_digest()

    def solve(counts, current, start, load, setup, out, facts, notes):
        # The digest is part of the cache's key because the function closes over it.
        if len(digest) == 0:
            return
        node = setup.ranks_per_node
        st = _new_layer(setup.ranks, setup.per_rank, load.pairs.shape[1], node)
        for n in range(current.shape[0]):
            solve_layer(
                counts, n, current[n], start[n], load, setup, st, out[n], facts[n], notes[n]
            )

    return cached_njit(nogil=True)(solve)
