"""Arms against each other: the order of turns, and ratios with bootstrap intervals.

Turns. Machines drift, and what ran before leaves traces, so each repeat runs every arm once, in
an order in which every arm follows every other equally often (a Williams design: A B, B A for
two arms), as far as the number of repeats reaches.

Ratios. In one repeat every arm gets the same requests at the same times, so that what makes a
request slow in any arm cancels. Turns are the unit of noise: requests of one turn share its queue
and its machine, and however many there are they say nothing of the next turn. A ratio is that of
the statistics over all turns; its standard error comes from leaving out each turn in both arms
(jackknife, of the logarithm), and its 95 % interval from Student's t with a degree of freedom less
than there are turns. With fewer than `LEAST_TURNS` there is none. The interval answers: over other
requests from this trace and other turns on this machine, where would this ratio lie? It does not
cover another trace, load or machine.

Differences. Of the many ratios of one comparison one in twenty would leave its interval by chance
alone. One is called a difference where it stands when all of them are asked at once (Holm's
procedure, 5 % for the comparison as a whole), so that an arm against itself shows none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from gimbal.records.schema import RequestRecord
from gimbal.report.metrics import (
    LATENCIES,
    Slo,
    duration_s,
    pooled_itl_ms,
    samples,
    statistics,
)
from gimbal.report.student import CONFIDENCE, quantile, within
from gimbal.report.window import Window

FloatArray = npt.NDArray[np.float64]
RATES = ("throughput_rps", "output_tokens_per_s", "goodput_rps")
LEAST_TURNS = 5
"""Turns of every arm without which nothing is said of noise."""

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
    """A ratio and its 95 % interval, NaN where there is none.

    Attributes:
        differs: it is no 1, all ratios of the comparison asked at once; None: nobody can tell.
    """

    ratio: float
    low: float = float("nan")
    high: float = float("nan")
    differs: bool | None = None

    def to_json(self) -> dict[str, float | bool | None]:
        """Its fields; what is NaN is null."""
        numbers = {"ratio": self.ratio, "low": self.low, "high": self.high}
        finite = {k: v if np.isfinite(v) else None for k, v in numbers.items()}
        return {**finite, "differs": self.differs}


class _Turn:
    """One arm's run: values by latency, and amounts by rate with the seconds they took."""

    def __init__(self, run: Sequence[RequestRecord], slo: Slo, window: Window | None) -> None:
        sample = samples(run if window is None else window.arrived(run))
        ended = samples(run if window is None else window.ended(run))
        self.values: dict[str, FloatArray] = {"itl_ms": pooled_itl_ms(sample)}
        for name in ("ttft_ms", "tpot_ms", "e2e_ms"):
            column: FloatArray = getattr(sample, name)
            self.values[name] = column[np.isfinite(column)]
        amounts = (len(ended.request_ids), ended.output_tokens.sum(), ended.good(slo).sum())
        self.amounts = dict(zip(RATES, map(float, amounts), strict=True))
        self.seconds = duration_s(run) if window is None else window.seconds


def _evaluate(turns: Sequence[_Turn]) -> dict[str, float]:
    """Every metric over `turns`; keys are ``metric`` or ``metric.statistic``, NaN without value."""
    result = {}
    for name in LATENCIES:
        pooled = np.concatenate([turn.values[name] for turn in turns])
        for key, value in statistics(pooled).items():
            result[f"{name}.{key}"] = np.nan if value is None else value
    seconds = sum(turn.seconds for turn in turns)
    for name in RATES:
        amount = sum(turn.amounts[name] for turn in turns)
        result[name] = amount / seconds if seconds > 0 else np.nan
    return result


def whole_turns(
    records: Iterable[RequestRecord], arms: Iterable[str]
) -> dict[str, list[list[RequestRecord]]]:
    """`records` as `compare` takes them: of every arm, the repeats that all `arms` have run."""
    found: dict[str, dict[int, list[RequestRecord]]] = {name: {} for name in arms}
    for record in records:
        found[record.arm].setdefault(record.repeat, []).append(record)
    whole = sorted(set.intersection(*map(set, found.values())))
    return {name: [own[repeat] for repeat in whole] for name, own in found.items()}


def compare(
    arms: Mapping[str, Runs], base: str, slo: Slo, window: Window | None = None
) -> dict[str, dict[str, Interval]]:
    """Ratios of every other arm to `base`: arm -> metric -> interval.

    Args:
        arms: name -> one list of records per repeat; repeat k has the same requests in each arm.
        base: the denominator.
        slo: what goodput counts.
        window: the measured part of every run; None measures whole runs.

    A ratio is NaN where an arm has no value.
    """
    count = min(len(runs) for runs in arms.values())
    turns = {n: [_Turn(run, slo, window) for run in runs[:count]] for n, runs in arms.items()}
    left = range(count) if count >= LEAST_TURNS else ()
    whole = {name: _evaluate(own) for name, own in turns.items()}
    without = {
        name: [_evaluate([*own[:k], *own[k + 1 :]]) for k in left] for name, own in turns.items()
    }
    result = {}
    for name in arms:
        if name == base:
            continue
        found = {}
        for metric, value in whole[name].items():
            pairs = zip(without[name], without[base], strict=True)
            parts = [_ratio(ours[metric], theirs[metric]) for ours, theirs in pairs]
            found[metric] = _interval(_ratio(value, whole[base][metric]), parts)
        result[name] = _judged(found)
    return result


def _ratio(value: float, base: float) -> float:
    return value / base if base else float("nan")


def _interval(ratio: float, without: Sequence[float]) -> tuple[Interval, float]:
    """The ratio's interval, and how likely it is as far from 1 by chance; NaN without one.

    Args:
        without: the ratio as each turn is left out.
    """
    count = len(without)
    if not count or not all(np.isfinite(r) and r > 0 for r in (ratio, *without)):
        return Interval(ratio), float("nan")
    logs, middle = np.log(without), float(np.log(ratio))
    error = float(np.sqrt((count - 1) / count * ((logs - logs.mean()) ** 2).sum()))
    reach = quantile(count - 1) * error
    chance = 1.0 if middle == 0 else 1 - within(abs(middle) / error, count - 1) if error else 0.0
    interval = Interval(ratio, float(np.exp(middle - reach)), float(np.exp(middle + reach)))
    return interval, chance


def _judged(found: Mapping[str, tuple[Interval, float]]) -> dict[str, Interval]:
    """The intervals with what differs: the least likely as far as each stands beside the rest."""
    asked = sorted((c, metric) for metric, (_, c) in found.items() if np.isfinite(c))
    stands = True
    result = {metric: interval for metric, (interval, _) in found.items()}
    for place, (chance, metric) in enumerate(asked):
        stands = stands and chance * (len(asked) - place) <= 1 - CONFIDENCE
        result[metric] = replace(result[metric], differs=stands)
    return result


def nested(ratios: Mapping[str, Interval]) -> dict[str, object]:
    """``metric.statistic`` keys as nested objects, in the shape of ``--json``."""
    result: dict[str, object] = {}
    for key, interval in ratios.items():
        values = interval.to_json()
        metric, _, statistic = key.partition(".")
        if statistic:
            inner = result.setdefault(metric, {})
            assert isinstance(inner, dict)
            inner[statistic] = values
        else:
            result[metric] = values
    return result
