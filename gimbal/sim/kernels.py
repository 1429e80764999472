"""The compiled part of a simulated step: fused-expert time, and the core's step-time formula."""

from __future__ import annotations

import math
import types
from collections.abc import Callable

import numpy as np

from gimbal.core.compiled import njit
from gimbal.core.contracts import FloatArray
from gimbal.core.cost import step


def _compile(function: object) -> object:
    return njit(nogil=True)(function)


def _compiled_device_us() -> Callable[[FloatArray, float, FloatArray], float]:
    """`step.device_us` and what it calls, compiled: one formula, two ways to run it."""
    leaves = ("terms_us", "group_tokens", "host_time_us")
    compiled = {name: _compile(getattr(step, name)) for name in leaves}
    namespace = {**vars(step), **compiled}
    for name in ("layer_parts_us", "device_us"):
        plain = getattr(step, name)
        namespace[name] = _compile(
            types.FunctionType(plain.__code__, namespace, name, plain.__defaults__)
        )
    result: Callable[[FloatArray, float, FloatArray], float] = namespace["device_us"]
    return result


device_us = _compiled_device_us()


@njit(nogil=True)
def experts_us(  # pragma: no cover - compiled
    tokens: FloatArray,
    pairs: FloatArray,
    active: FloatArray,
    grid_log: FloatArray,
    noise: FloatArray,
    burstiness: float,
    constants: FloatArray,
    off_source_us: float,
    source_of_rank: FloatArray,
) -> tuple[float, float, float]:
    """Sums over layers of the slowest rank's time and of mean/max of rank pairs; the step's tokens.

    The same time as `step.moe_us` with fewer powers, which are most of its cost: a rank that has
    neither more pairs nor more active experts than the slowest so far is passed over, and one
    root per layer is taken of the largest sum.

    Args:
        tokens: [dp, domains] tokens of the step.
        pairs: [domains, layers, ranks] pairs per token, see `RoutingTables`.
        active: [grid, layers, ranks] expected distinct experts.
        grid_log: [grid] natural logs of the grid's token counts.
        noise: [layers, ranks] standard normals of this step.
        burstiness: see `Population`.
        constants: base, per active expert, per pair, per group token, norm (`MoeTerm`).
        off_source_us: microseconds per pair that leaves its source's ranks; 0 for all-gather.
        source_of_rank: [ranks] the DP engine that owns the rank.
    """
    dp, domains = tokens.shape
    _, layers, ranks = pairs.shape
    per_domain = np.zeros(domains)
    for e in range(dp):
        for d in range(domains):
            per_domain[d] += tokens[e, d]
    group = per_domain.sum()
    if group <= 0.0:
        return layers * constants[0], float(layers), group
    position = math.log(max(group, 1.0))
    upper = min(max(int(np.searchsorted(grid_log, position)), 1), len(grid_log) - 1)
    lower = upper - 1
    weight = (position - grid_log[lower]) / (grid_log[upper] - grid_log[lower])
    weight = min(max(weight, 0.0), 1.0)
    norm = constants[4]
    time = layers * (constants[0] + constants[3] * group)
    balance = 0.0
    for layer in range(layers):
        slowest = slowest_p = slowest_a = 0.0
        most = total = 0.0
        for rank in range(ranks):
            p = 0.0
            for d in range(domains):
                p += per_domain[d] * pairs[d, layer, rank]
            p = max(p + noise[layer, rank] * math.sqrt(burstiness * p), 0.0)
            a = (1.0 - weight) * active[lower, layer, rank] + weight * active[upper, layer, rank]
            a = min(a, p)  # no more distinct experts than pairs
            total += p
            most = max(most, p)
            if p > slowest_p or a > slowest_a:
                work = (constants[1] * a) ** norm + (constants[2] * p) ** norm
                if work > slowest:
                    slowest, slowest_p, slowest_a = work, p, a
        balance += total / (ranks * most) if most > 0.0 else 1.0
        time += slowest ** (1.0 / norm)
        if off_source_us > 0.0:
            time += off_source_us * _most_leaving(tokens, pairs, layer, source_of_rank)
    return time, balance, group


@njit(nogil=True)
def _most_leaving(  # pragma: no cover - compiled
    tokens: FloatArray, pairs: FloatArray, layer: int, source_of_rank: FloatArray
) -> float:
    """Most pairs of `layer` that leave any one DP engine's own ranks."""
    worst = 0.0
    for e in range(len(tokens)):
        leaving = 0.0
        for rank in range(pairs.shape[2]):
            if source_of_rank[rank] != e:
                for d in range(pairs.shape[0]):
                    leaving += tokens[e, d] * pairs[d, layer, rank]
        worst = max(worst, leaving)
    return worst
