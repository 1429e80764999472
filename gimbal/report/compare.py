"""Arms against each other: the order of turns, and ratios with bootstrap intervals.

Turns. Machines drift, and what ran before leaves traces, so each repeat runs every arm once, in
an order in which every arm follows every other equally often (a Williams design: A B, B A for
two arms), as far as the number of repeats reaches.

Ratios. In one repeat every arm gets the same requests at the same times. A bootstrap draw takes
repeats with replacement, and within each drawn repeat request positions with replacement; the
same draw is applied to both arms, so what makes a request slow in any arm cancels. The interval
is the 2.5 to 97.5 percentile of the ratio over draws. It answers: over other requests from this
trace and other runs on this machine, where would this ratio lie? It does not cover another trace,
load or machine. With one repeat it knows nothing of differences between runs and is too narrow;
requests of one run share its queue, which only the drawing of repeats accounts for, so with
fewer than about five repeats read it as a lower bound of the uncertainty.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gimbal.records.schema import RequestRecord
from gimbal.report.metrics import LATENCIES, STATISTICS, Samples, Slo, duration_s, samples
from gimbal.report.window import Window

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
RATES = ("throughput_rps", "output_tokens_per_s", "goodput_rps")
QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}

Runs = Sequence[Sequence[RequestRecord]]


def williams_order(count: int) -> list[list[int]]:
    """Rows of a Williams design: each row a permutation of range(count), carry-over balanced.

    `count` rows when it is even, twice as many (each row also mirrored) when it is odd.
    """
    first = [0]
    low, high = 1, count - 1
    while len(first) < count:
        first.append(low if len(first) % 2 else high)
        low, high = (low + 1, high) if len(first) % 2 == 0 else (low, high - 1)
    rows = [[(value + shift) % count for value in first] for shift in range(count)]
    if count % 2 == 0:
        # Row s + count/2 is row s mirrored; alternating the two gives A B, B A, ...
        half = count // 2
        return [rows[s + offset] for s in range(half) for offset in (0, half)]
    return [order for row in rows for order in (row, row[::-1])]


def turns(arms: Sequence[str], repeats: int) -> list[list[str]]:
    """For each repeat the order in which its arms run."""
    rows = williams_order(len(arms))
    return [[arms[i] for i in rows[repeat % len(rows)]] for repeat in range(repeats)]


@dataclass(frozen=True)
class Interval:
    """A ratio and its 95 % interval."""

    ratio: float
    low: float
    high: float

    def to_json(self) -> dict[str, float]:
        return {"ratio": self.ratio, "low": self.low, "high": self.high}


@dataclass(frozen=True)
class _Sorted:
    """Values in ascending order with the flat request position each belongs to."""

    values: FloatArray
    position: IntArray

    def statistics(self, counts: IntArray) -> dict[str, float]:
        """Mean and percentiles of the sample in which value i occurs counts[position i] times.

        Percentiles interpolate linearly, as numpy does on the repeated values.
        """
        weight = counts[self.position]
        total = int(weight.sum())
        if total == 0:
            return dict.fromkeys(STATISTICS, float("nan"))
        reached = np.cumsum(weight)
        result = {"mean": float(weight @ self.values) / total}
        last = len(self.values) - 1
        for name, q in QUANTILES.items():
            place = q * (total - 1)
            below = int(place)
            ends = np.searchsorted(reached, [below, min(below + 1, total - 1)], side="right")
            low, high = self.values[np.minimum(ends, last)]
            result[name] = float(low + (high - low) * (place - below))
        return result


class _ArmSamples:
    """One arm's runs, flattened over repeats; position = offset of the repeat + request index."""

    def __init__(
        self, runs: Runs, offsets: IntArray, slo: Slo, window: Window | None = None
    ) -> None:
        total = int(offsets[-1])
        self.done = np.zeros(total)
        self.good = np.zeros(total)
        self.tokens = np.zeros(total)
        self.durations = np.array([window.seconds if window else duration_s(run) for run in runs])
        values: dict[str, list[FloatArray]] = {name: [] for name in LATENCIES}
        positions: dict[str, list[IntArray]] = {name: [] for name in LATENCIES}
        for repeat, run in enumerate(runs):
            index = {r.request_id: r.index for r in run}
            ended = samples(window.ended(run) if window else run)
            place = _places(ended, index) + offsets[repeat]
            self.done[place] = 1
            self.good[place] = ended.good(slo)
            self.tokens[place] = ended.output_tokens
            sample = samples(window.arrived(run) if window else run)
            place = _places(sample, index) + offsets[repeat]
            for name in ("ttft_ms", "tpot_ms", "e2e_ms"):
                column: FloatArray = getattr(sample, name)
                keep = np.isfinite(column)
                values[name].append(column[keep])
                positions[name].append(place[keep])
            values["itl_ms"].extend(sample.itl_ms)
            positions["itl_ms"].extend(
                np.full(len(gaps), where) for gaps, where in zip(sample.itl_ms, place, strict=True)
            )
        self.latencies = {n: _sorted(values[n], positions[n]) for n in LATENCIES}

    def evaluate(self, counts: IntArray, repeats: IntArray) -> dict[str, float]:
        """Every metric under one draw; keys are ``metric`` or ``metric.statistic``."""
        result = {}
        for name, column in self.latencies.items():
            for key, value in column.statistics(counts).items():
                result[f"{name}.{key}"] = value
        time_s = float(self.durations @ repeats)
        for name, amount in zip(RATES, (self.done, self.tokens, self.good), strict=True):
            result[name] = float(counts @ amount) / time_s if time_s > 0 else float("nan")
        return result


def _places(sample: Samples, index: Mapping[str, int]) -> IntArray:
    return np.array([index[i] for i in sample.request_ids], dtype=np.int64)


def _sorted(values: list[FloatArray], positions: list[IntArray]) -> _Sorted:
    flat = np.concatenate(values) if values else np.empty(0)
    where = np.concatenate(positions) if positions else np.empty(0, dtype=np.int64)
    order = np.argsort(flat, kind="stable")
    return _Sorted(flat[order], where[order].astype(np.int64))


def compare(
    arms: Mapping[str, Runs],
    base: str,
    slo: Slo,
    rng: np.random.Generator,
    draws: int = 1000,
    window: Window | None = None,
) -> dict[str, dict[str, Interval]]:
    """Ratios of every other arm to `base`: arm -> metric -> interval.

    Args:
        arms: name -> one list of records per repeat; repeat k has the same requests in each arm.
        base: the denominator.
        slo: what goodput counts.
        rng: source of the draws.
        draws: bootstrap samples.
        window: the measured part of every run; None measures whole runs.

    A ratio is NaN where an arm has no value; so are the ends of an interval that needs more than
    one repeat: the rate of completions depends on how long a run took, not on which request.
    """
    repeats = min(len(runs) for runs in arms.values())
    sizes = [
        max((r.index + 1 for runs in arms.values() for r in runs[k]), default=0)
        for k in range(repeats)
    ]
    offsets = np.concatenate(([0], np.cumsum(sizes))).astype(np.int64)
    prepared = {n: _ArmSamples(runs[:repeats], offsets, slo, window) for n, runs in arms.items()}
    once = np.ones(offsets[-1], dtype=np.int64)
    point = {n: a.evaluate(once, np.ones(repeats, np.int64)) for n, a in prepared.items()}
    drawn: dict[str, dict[str, list[float]]] = {
        name: {metric: [] for metric in point[base]} for name in arms if name != base
    }
    for _ in range(draws):
        picked = rng.multinomial(repeats, np.full(repeats, 1.0 / repeats))
        counts = _request_counts(picked, sizes, rng)
        values = {n: a.evaluate(counts, picked) for n, a in prepared.items()}
        for name, columns in drawn.items():
            for metric, column in columns.items():
                column.append(_ratio(values[name][metric], values[base][metric]))
    if repeats == 1:
        for columns in drawn.values():
            columns["throughput_rps"] = columns["output_tokens_per_s"] = []
    return {
        name: {
            metric: _interval(_ratio(point[name][metric], point[base][metric]), column)
            for metric, column in columns.items()
        }
        for name, columns in drawn.items()
    }


def _request_counts(picked: IntArray, sizes: Sequence[int], rng: np.random.Generator) -> IntArray:
    """[requests of all repeats] how often each position was drawn."""
    parts = []
    for times, size in zip(picked, sizes, strict=True):
        part = rng.integers(0, size, size=int(times) * size) if size else np.empty(0, np.int64)
        parts.append(np.bincount(part, minlength=size))
    counts: IntArray = np.concatenate(parts).astype(np.int64)
    return counts


def _ratio(value: float, base: float) -> float:
    return value / base if base else float("nan")


def _interval(ratio: float, draws: Sequence[float]) -> Interval:
    finite = np.array([d for d in draws if np.isfinite(d)])
    if not len(finite):
        return Interval(ratio, float("nan"), float("nan"))
    low, high = np.percentile(finite, [2.5, 97.5])
    return Interval(ratio, float(low), float(high))


def nested(ratios: Mapping[str, Interval]) -> dict[str, object]:
    """``metric.statistic`` keys as nested objects, in the shape of ``--json``; NaN is null."""
    result: dict[str, object] = {}
    for key, interval in ratios.items():
        values = {k: v if np.isfinite(v) else None for k, v in interval.to_json().items()}
        metric, _, statistic = key.partition(".")
        if statistic:
            inner = result.setdefault(metric, {})
            assert isinstance(inner, dict)
            inner[statistic] = values
        else:
            result[metric] = values
    return result
