"""The compiled part of a simulated step: fused-expert time, and the core's step-time formula."""

from __future__ import annotations

import math
import types
from collections.abc import Callable

import numba as nb
import numpy as np

from gimbal.core.contracts import FloatArray
from gimbal.core.cost import step


def _compile(function: object) -> object:
    return nb.njit(cache=True, nogil=True)(function)


def _compiled_device_us() -> Callable[[FloatArray, float, FloatArray], float]:
    """`step.device_us` and what it calls, compiled: one formula, two ways to run it."""
    compiled = {name: _compile(getattr(step, name)) for name in ("terms_us", "group_tokens")}
    namespace = {**vars(step), **compiled}
    for name in ("layer_parts_us", "device_us"):
        plain = getattr(step, name)
        namespace[name] = _compile(
            types.FunctionType(plain.__code__, namespace, name, plain.__defaults__)
        )
    result: Callable[[FloatArray, float, FloatArray], float] = namespace["device_us"]
    return result


device_us = _compiled_device_us()


@nb.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
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
) -> tuple[float, float]:
    """(sum over layers of the slowest rank's time, sum over layers of mean/max of rank pairs).

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
    group = 0.0
    per_domain = np.zeros(domains)
    for e in range(dp):
        for d in range(domains):
            group += tokens[e, d]
            per_domain[d] += tokens[e, d]
    if group <= 0.0:
        return layers * constants[0], float(layers)
    position = math.log(max(group, 1.0))
    upper = min(max(int(np.searchsorted(grid_log, position)), 1), len(grid_log) - 1)
    lower = upper - 1
    weight = (position - grid_log[lower]) / (grid_log[upper] - grid_log[lower])
    weight = min(max(weight, 0.0), 1.0)
    norm = constants[4]
    inverse = 1.0 / norm
    time = layers * (constants[0] + constants[3] * group)
    balance = 0.0
    for layer in range(layers):
        slowest = 0.0
        most = 0.0
        total = 0.0
        for rank in range(ranks):
            p = 0.0
            for d in range(domains):
                p += per_domain[d] * pairs[d, layer, rank]
            p = max(p + noise[layer, rank] * math.sqrt(burstiness * p), 0.0)
            a = (1.0 - weight) * active[lower, layer, rank] + weight * active[upper, layer, rank]
            a = min(a, p)
            work = ((constants[1] * a) ** norm + (constants[2] * p) ** norm) ** inverse
            total += p
            most = max(most, p)
            slowest = max(slowest, work)
        balance += total / (ranks * most) if most > 0.0 else 1.0
        time += slowest
        if off_source_us > 0.0:
            worst = 0.0
            for e in range(dp):
                leaving = 0.0
                for rank in range(ranks):
                    if source_of_rank[rank] != e:
                        for d in range(domains):
                            leaving += tokens[e, d] * pairs[d, layer, rank]
                worst = max(worst, leaving)
            time += off_source_us * worst
    return time, balance
