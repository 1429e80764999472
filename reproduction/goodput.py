"""The highest rate at which requests keep their regime's limits, from the regimes' own cells.

A share is that of all seeds' requests together. Every arm begins at the load next to `BEGIN`. It
goes down while it misses the higher share, and up while it keeps the lower one: loads beyond are
not run. Cells are those of `regimes`, so that one directory serves both, and other limits need few
more. Intervals are over seeds (jackknife of the logarithm, Student's t), as in `report.compare`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gimbal.report.arms import get_arm
from gimbal.report.compare import LEAST_TURNS
from gimbal.report.metrics import Slo, samples
from gimbal.report.student import quantile
from gimbal.report.window import Window
from gimbal.sim.cells import completed
from gimbal.sim.comparison import bed_of, cells_of
from gimbal.sim.goodput import SHARES, highest_rate
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
        shares_at: by arm, at a load, for some arms; one that it leaves out is asked for at the next
            load.
    """
    found: Shares = {name: {} for name in ARMS}
    begin = min(range(len(loads)), key=lambda index: abs(loads[index] - BEGIN))

    def run(index: int, names: Sequence[str]) -> None:
        for name, shares in (shares_at(loads[index], names) if names else {}).items():
            found[name][loads[index]] = shares

    def keeps(name: str, end: Callable[[Iterable[float]], float], wanted: float) -> bool:
        """Whether it does at the lowest or highest load so far."""
        own = found[name]
        return float(np.mean(own[end(own)])) >= wanted

    run(begin, ARMS)
    begun = [name for name in ARMS if found[name]]
    for index in reversed(range(begin)):
        run(index, [name for name in begun if not keeps(name, min, SHARES[0])])
    for index in range(begin + 1, len(loads)):
        run(index, [name for name in begun if keeps(name, max, SHARES[1])])
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

    The best peer is the one with the highest rate; chosen after the fact, it is better than any one
    peer is.

    Args:
        shares: arm -> load -> shares that keep the limits, by seed.
    """
    keys = {f"{wanted:.0%}": wanted for wanted in SHARES}
    bounds = {
        name: {key: bounds_of(own, capacity_rps, wanted) for key, wanted in keys.items()}
        for name, own in shares.items()
    }
    rates = {name: {key: estimate(own[key]) for key in keys} for name, own in bounds.items()}

    def rank(peer: str, key: str) -> tuple[bool, float]:
        """A rate that is somewhere below a load is none to be ahead with."""
        own = rates[peer][key]
        return own["mark"] != "<=", own["value"] or 0.0

    best = {key: max(PEERS, key=lambda peer: rank(peer, key)) for key in keys}
    ours = bounds[OURS]
    return {
        "rates": rates,
        "best_peer": best,
        "to_vllm": {key: estimate(ours[key], bounds[BASE][key]) for key in keys},
        "to_best_peer": {key: estimate(ours[key], bounds[best[key]][key]) for key in keys},
    }


Bound = tuple[float, str]
"""A rate, and how the wanted one stands to it: ``""`` (it is it), ``">="`` or ``"<="``."""


def bounds_of(
    own: Mapping[float, Sequence[float]], capacity_rps: float, wanted: float
) -> list[Bound]:
    """The highest rate of all seeds together, then without each of them; none without a load.

    Args:
        own: load, ascending -> shares that keep the limits, by seed.
    """
    if not own:
        return []
    rates, shares = np.array(list(own)) * capacity_rps, np.array(list(own.values()))
    seeds = shares.shape[1]
    parts = [np.delete(shares, out, axis=1) for out in range(seeds)] if seeds > 1 else []
    found = []
    for part in (shares, *parts):
        rate = highest_rate(rates, part.mean(axis=1), wanted)
        if rate is None:
            found.append((float(rates[-1]), ">="))
        else:
            found.append((rate, "") if rate else (float(rates[0]), "<="))
    return found


_OTHER_WAY = {"": "", ">=": "<=", "<=": ">="}


def estimate(ours: Sequence[Bound], theirs: Sequence[Bound] | None = None) -> dict[str, Any]:
    """A rate, or its ratio to another's: ``value``, ``low``, ``high`` and ``mark``.

    The mark is that of a bound, and a bound has no interval; nothing is known of a ratio of bounds
    that go the same way. Without any one seed it must not be a bound either for an interval.
    """
    nothing: dict[str, Any] = {"value": None, "low": None, "high": None, "mark": ""}
    if not ours or theirs == []:
        return nothing
    base = [(1.0, "")] * len(ours) if theirs is None else theirs
    kinds = {ours[0][1], _OTHER_WAY[base[0][1]]} - {""}
    if len(kinds) > 1:
        return nothing
    logs = np.log([own[0] / other[0] for own, other in zip(ours, base, strict=True)])
    found = nothing | {"value": float(np.exp(logs[0])), "mark": next(iter(kinds), "")}
    seeds = len(ours) - 1
    if seeds < LEAST_TURNS or any(kind for _, kind in (*ours, *base)):
        return found
    reach = quantile(seeds - 1) * float(np.std(logs[1:]) * (seeds - 1) ** 0.5)
    return found | {"low": float(np.exp(logs[0] - reach)), "high": float(np.exp(logs[0] + reach))}
