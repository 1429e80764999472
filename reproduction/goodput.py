"""The highest rate at which requests keep their regime's limits, from the regimes' own cells.

Every arm begins at the load next to `BEGIN`. It goes down while any seed's run misses the higher
share, and up while any keeps the lower one: what lies beyond is not run, and a run that was never
needed is taken to be on the side it would be. Cells are those of `regimes`, so that one directory
serves both, and other limits need few more.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gimbal.report.arms import get_arm
from gimbal.report.metrics import Slo, samples
from gimbal.report.window import Window
from gimbal.sim.cells import completed
from gimbal.sim.comparison import bed_of, cells_of
from gimbal.sim.goodput import SHARES, highest_rate, rate_of
from reproduction.regimes import (
    BASE,
    OURS,
    PEERS,
    Plan,
    Regime,
    cell_files,
    keep_cell,
    kept_capacity,
    options_of,
    read_cell,
)

ARMS = (BASE, OURS, *PEERS)
BEGIN = 0.7
LOADS = (0.1, 0.3, 0.5, 0.7, 0.9, 1.1, 1.3)


@dataclass(frozen=True, slots=True)
class Target:
    """Attributes:
    slo: what a good request keeps.
    reason: where the limits come from.
    aim: ratios of the rate at the higher share to vLLM's and to the best peer's.
    """

    slo: Slo
    reason: str
    aim: tuple[float, float]


_MOONCAKE = (
    "Mooncake (FAST 2025) serves conversations with long contexts at a TTFT of at most 30 s and at "
    "most 100, 200 or 300 ms between tokens; the widest"
)
_MLPERF_8B = "MLPerf Inference, Llama 3.1 8B, server scenario: the smallest model it limits"
TARGETS = {
    "chat": Target(Slo(30_000.0, 300.0), _MOONCAKE, (1.5, 1.1)),
    "mooncake": Target(Slo(30_000.0, 300.0), _MOONCAKE, (1.5, 1.1)),
    "agent": Target(Slo(30_000.0, 300.0), _MOONCAKE, (2.0, 1.1)),
    "reasoning": Target(
        Slo(2_000.0, 80.0), "MLPerf Inference, DeepSeek-R1, server scenario", (1.2, 1.05)
    ),
    "burst": Target(Slo(2_000.0, 100.0), _MLPERF_8B, (1.3, 1.2)),
    "azure": Target(Slo(2_000.0, 100.0), _MLPERF_8B, (1.3, 1.2)),
}
"""By regime."""

Shares = dict[str, dict[float, list[float]]]
"""arm -> load, ascending -> shares of the requests that keep the limits, by seed."""


def walk(
    loads: Sequence[float],
    shares_at: Callable[[float, Sequence[str]], Mapping[str, list[float]]],
) -> Shares:
    """Shares at as few loads of every arm as say where `SHARES` are crossed.

    Args:
        loads: ascending.
        shares_at: by arm, at a load, for some arms; those it leaves out go no further that way.
    """
    found: Shares = {name: {} for name in ARMS}

    def run(index: int, names: Sequence[str]) -> list[str]:
        got = shares_at(loads[index], names) if names else {}
        for name, shares in got.items():
            found[name][loads[index]] = shares
        return list(got)

    begin = min(range(len(loads)), key=lambda index: abs(loads[index] - BEGIN))
    every = run(begin, ARMS)
    names = every
    for index in reversed(range(begin)):
        above = loads[index + 1]
        names = run(index, [name for name in names if min(found[name][above]) < SHARES[0]])
    names = every
    for index in range(begin + 1, len(loads)):
        below = loads[index - 1]
        names = run(index, [name for name in names if max(found[name][below]) >= SHARES[1]])
    return {name: dict(sorted(own.items())) for name, own in found.items()}


def run_goodput(
    regime: Regime,
    plan: Plan,
    slo: Slo,
    directory: Path,
    jobs: int,
    run: bool = True,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """The figures of one regime: what every arm attains at each load, its highest rates, ratios.

    Args:
        plan: its loads are those that may be run, ascending.
        jobs: processes.
        run: False takes only cells that are there; rates are bounds where some lack.
        say: gets a few words about what is done.

    Raises InputError for what cannot be simulated.
    """
    options = options_of(regime, plan)
    bed = bed_of(options)
    capacity = kept_capacity(regime, options, bed, directory, say, run)
    code: set[str] = set()

    def shares_at(load: float, names: Sequence[str]) -> dict[str, list[float]]:
        say(f"{regime.name} at load {load:g}: {', '.join(names)}")
        own = dataclasses.replace(options, load=load, arms=tuple(map(get_arm, names)))
        tasks = cell_files(regime, load, cells_of(own, bed, capacity), directory)
        missing = [task for task in tasks if not task[0].exists()]
        if run:
            for _ in completed(keep_cell, missing, min(jobs, len(missing))):
                pass
            missing = []
        lacking = {cell.arm.name for _, cell in missing}
        found: dict[str, list[float]] = {name: [] for name in names if name not in lacking}
        for path, cell in tasks:
            if cell.arm.name in found:
                found[cell.arm.name].append(_attained(path, cell.window, slo, code))
        return found

    shares = walk(plan.loads, shares_at)
    return {
        "regime": regime.name,
        "cluster": bed.cluster.name,
        "slo": slo.limits(),
        "capacity_rps": capacity.rate_rps,
        "code": sorted(code),
        "attained": shares,
        **figures(shares, capacity.rate_rps),
    }


def _attained(path: Path, window: Window | None, slo: Slo, code: set[str]) -> float:
    result, version = read_cell(path)
    code.add(version)
    measured = result.records if window is None else window.arrived(result.records)
    return float(samples(measured).good(slo).sum()) / max(1, len(measured))


def figures(
    shares: Mapping[str, Mapping[float, Sequence[float]]], capacity_rps: float
) -> dict[str, Any]:
    """Highest rates of all arms, and ratios of ours to vLLM's and to the best peer's.

    The best peer is the one with the highest rate over all seeds; chosen after the fact, it is
    better than any one peer is.

    Args:
        shares: arm -> load -> shares that keep the limits, by seed.
    """
    bounds = {
        name: {f"{wanted:.0%}": _bounds(own, capacity_rps, wanted) for wanted in SHARES}
        for name, own in shares.items()
    }
    keys = [f"{wanted:.0%}" for wanted in SHARES]
    rates = {name: {key: summary(own[key]) for key in keys} for name, own in bounds.items()}
    best = {key: max(PEERS, key=lambda peer: rates[peer][key]["value"] or 0.0) for key in keys}
    ours = bounds[OURS]
    return {
        "rates": rates,
        "best_peer": best,
        "to_vllm": {key: ratio(ours[key], bounds[BASE][key]) for key in keys},
        "to_best_peer": {key: ratio(ours[key], bounds[best[key]][key]) for key in keys},
    }


Bound = tuple[float, str]
"""A rate, and how the wanted one stands to it: ``""`` (it is it), ``">="`` or ``"<="``."""


def _bounds(
    own: Mapping[float, Sequence[float]], capacity_rps: float, wanted: float
) -> list[Bound]:
    """By seed."""
    if not own:
        return []
    rates = np.array(list(own)) * capacity_rps
    found = []
    for shares in zip(*own.values(), strict=True):
        rate = highest_rate(rates, np.array(shares), wanted)
        if rate is None:
            found.append((float(rates[-1]), ">="))
        else:
            found.append((rate, "") if rate else (float(rates[0]), "<="))
    return found


def summary(rates: Sequence[Bound]) -> dict[str, Any]:
    """Mean over seeds with its interval; with bounds among them a bound, or nothing."""
    mark = _mark([kind for _, kind in rates])
    if not rates or mark is None:
        return _NOTHING
    values = rate_of([rate for rate, _ in rates])
    return values | {"mark": mark} | (dict.fromkeys(("low", "high")) if mark else {})


def ratio(ours: Sequence[Bound], theirs: Sequence[Bound]) -> dict[str, Any]:
    """Geometric mean over seeds, paired; with bounds among them a bound, or nothing."""
    other = {"": "", ">=": "<=", "<=": ">="}
    pairs = list(zip(ours, theirs, strict=False))
    kinds = [own[1] for own, _ in pairs] + [other[base[1]] for _, base in pairs]
    mark = _mark(kinds)
    if not pairs or mark is None:
        return _NOTHING
    values = rate_of([own[0] for own, _ in pairs], [base[0] for _, base in pairs])
    return values | {"mark": mark} | (dict.fromkeys(("low", "high")) if mark else {})


_NOTHING: dict[str, Any] = {"value": None, "low": None, "high": None, "mark": ""}


def _mark(kinds: Sequence[str]) -> str | None:
    """What bounds make of a mean: None where they go both ways."""
    ways = {kind for kind in kinds if kind}
    return None if len(ways) > 1 else next(iter(ways), "")
