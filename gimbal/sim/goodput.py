"""The highest rate at which requests keep their targets, per arm.

Every arm runs the same requests at several shares of the base arm's capacity. Of each run counts
the share of requests of the window that keep every limit. The highest rate at which 99 % (90 %) of
them do lies between the last rate before which no run fails and the first that does, where a
straight line between the two shares crosses it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gimbal.core.contracts import FloatArray
from gimbal.report.compare import LEAST_TURNS
from gimbal.report.metrics import Slo, samples
from gimbal.report.student import quantile
from gimbal.sim.cells import Cell, completed, simulated
from gimbal.sim.comparison import ComparisonOptions, bed_of, capacity_of, cells_of

SHARES = (0.99, 0.9)
"""Of requests that must keep the limits."""
LOADS = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25)


def attained(task: tuple[Cell, Slo]) -> float:
    """Share of a run's measured requests that end and keep every limit."""
    cell, slo = task
    records = simulated(cell).records
    measured = records if cell.window is None else cell.window.arrived(records)
    return float(samples(measured).good(slo).sum()) / max(1, len(measured))


def goodput(
    options: ComparisonOptions,
    loads: Sequence[float] = LOADS,
    jobs: int = 1,
    on_done: Callable[[int, int], None] = lambda done, total: None,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """The report: rates, what every arm attains at each, and its highest rates.

    Args:
        options: `load` is replaced.
        loads: ascending shares of the base arm's capacity.
        jobs: processes.
        on_done: called with (finished, all) runs.
        say: gets a few words about what is done before the runs.

    Raises InputError before anything runs for what cannot be simulated.
    """
    bed = bed_of(options)
    capacity = capacity_of(options, bed, say)
    cells = [
        cell
        for load in loads
        for cell in cells_of(dataclasses.replace(options, load=load), bed, capacity)
    ]
    tasks, shares = [(cell, options.slo) for cell in cells], np.zeros(len(cells))
    for done, (index, share) in enumerate(completed(attained, tasks, min(jobs, len(tasks)))):
        shares[index] = share
        on_done(done + 1, len(tasks))
    found = shares.reshape(len(loads), options.repeats, len(options.arms))
    return _report(options, bed.cluster.name, np.array(loads) * capacity.rate_rps, found) | {
        "capacity_rps": capacity.rate_rps
    }


def _report(
    options: ComparisonOptions, cluster: str, rates: FloatArray, found: FloatArray
) -> dict[str, Any]:
    """Args:
    found: [rates, repeats, arms] shares that keep the limits.
    """
    names = [arm.name for arm in options.arms]
    highest = {
        name: {
            f"{share:.0%}": [
                highest_rate(rates, found[:, repeat, at], share)
                for repeat in range(options.repeats)
            ]
            for share in SHARES
        }
        for at, name in enumerate(names)
    }
    base = highest[options.base.name]
    return {
        "cluster": cluster,
        "trace": options.trace.name,
        "base": options.base.name,
        "slo": options.slo.limits(),
        "seed": options.seed,
        "repeats": options.repeats,
        "rates_rps": rates.tolist(),
        "arms": {
            name: {
                "attained": found[:, :, at].mean(axis=1).tolist(),
                "rate_rps": {key: rate_of(own) for key, own in highest[name].items()},
                "ratio": {key: rate_of(own, base[key]) for key, own in highest[name].items()},
            }
            for at, name in enumerate(names)
        },
    }


def highest_rate(rates: FloatArray, shares: FloatArray, wanted: float) -> float | None:
    """The highest of the rates up to which `wanted` keep the limits.

    Args:
        rates, shares: [rates] ascending rates, and the shares that keep the limits at each.

    0 where none does at the lowest rate, None where all do at the highest.
    """
    failing = np.flatnonzero(shares < wanted)
    if not len(failing):
        return None
    first = int(failing[0])
    if first == 0:
        return 0.0
    high, low = shares[first - 1], shares[first]
    part = (high - wanted) / (high - low)
    return float(rates[first - 1] + part * (rates[first] - rates[first - 1]))


def rate_of(
    rates: Sequence[float | None], base: Sequence[float | None] | None = None
) -> dict[str, float | None]:
    """Mean of `rates` over repeats, or their geometric mean over those of `base`, with a 95 %
    interval (Student's t) from `LEAST_TURNS` repeats on; None where a rate is not known."""
    nothing: dict[str, float | None] = dict.fromkeys(("value", "low", "high"))
    values = [r for r in rates if r is not None]
    if base is not None:
        pairs = zip(rates, base, strict=True)
        values = [float(np.log(r / b)) for r, b in pairs if r and b]
    count = len(values)
    if count < len(rates):
        return nothing
    middle = float(np.mean(values))
    ends = [middle]
    if count >= LEAST_TURNS:
        reach = quantile(count - 1) * float(np.std(values, ddof=1)) / count**0.5
        ends += [middle - reach, middle + reach]
    if base is not None:
        ends = [float(np.exp(end)) for end in ends]
    return nothing | dict(zip(nothing, ends, strict=False))
