"""What a chart shows, apart from how `svg` draws it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
COLOURS = (
    "#4269d0",
    "#efb118",
    "#ff725c",
    "#3ca951",
    "#a463f2",
    "#6cc5b0",
    "#9c6b4e",
    "#ff8ab7",
    "#97bbf5",
    "#9498a0",
)
MAX_POINTS = 400


def colour_of(names: Sequence[str], name: str) -> str:
    """The colour of `name` in every chart of one report."""
    return COLOURS[list(names).index(name) % len(COLOURS)]


@dataclass(frozen=True)
class Lines:
    """Series over an axis; `points` draws marks, not lines, and the diagonal y = x.

    Attributes:
        series: name -> (x, y), finite values.
        log_x, log_y: logarithmic axes; values <= 0 are left out.
        y_ticks: fixed ticks; None finds some.
        percent_y: ticks are shares.
        y_from: where a linear y axis begins, unless there are lower values.
    """

    title: str
    x_label: str
    y_label: str
    series: Mapping[str, tuple[FloatArray, FloatArray]]
    names: Sequence[str]
    log_x: bool = False
    log_y: bool = False
    y_ticks: Sequence[float] | None = None
    percent_y: bool = False
    points: bool = False
    y_from: float = 0.0


@dataclass(frozen=True)
class Bars:
    """Groups of bars; a value of None leaves its place empty."""

    title: str
    y_label: str
    groups: Sequence[str]
    series: Mapping[str, Sequence[float | None]]
    names: Sequence[str]


@dataclass(frozen=True)
class Heat:
    """A matrix as colours; `middle` is drawn neutral, less than it blue and more red."""

    title: str
    x_label: str
    y_label: str
    values: FloatArray
    unit: str
    middle: float | None = None
    steps: int = field(default=0)  # > 0: so many categories, in COLOURS


Chart = Lines | Bars | Heat


def cdf(title: str, unit: str, samples: Mapping[str, FloatArray], names: Sequence[str]) -> Lines:
    """Cumulative distributions over a logarithmic axis; values <= 0 are left out."""
    series = {}
    for name, values in samples.items():
        kept = np.sort(values[np.isfinite(values) & (values > 0)])
        if not len(kept):
            continue
        picked = np.unique(np.linspace(0, len(kept) - 1, min(MAX_POINTS, len(kept))).astype(int))
        series[name] = kept[picked], (picked + 1) / len(kept)
    ticks = (0, 0.25, 0.5, 0.75, 0.9, 1)
    return Lines(title, unit, "share", series, names, True, False, ticks, True)


def linear_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round values in low..high, at most `about` + 2 of them."""
    if not (high - low) / about > 0:
        return [low]
    raw = (high - low) / about
    scale = 10.0 ** math.floor(math.log10(raw))
    step = next(s * scale for s in (1, 2, 5, 10) if s * scale >= raw)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float, about: int = 6) -> list[float]:
    """Powers of ten in low..high, with 2 and 5 between them where there is room."""
    if not high > low > 0:
        return [low]
    if high / low < 4:
        return linear_ticks(low, high)
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for steps in ((1, 2, 5), (1, 3), (1,)):
        ticks = [s * 10.0**d for d in range(first, last + 1) for s in steps]
        ticks = [t for t in ticks if low <= t <= high]
        if len(ticks) <= about + 1:
            return ticks
    return ticks[:: math.ceil(len(ticks) / about)]


def limits(chart: Lines) -> tuple[float, float, float, float]:
    """(x low, x high, y low, y high) of a chart's data, a little wider."""
    xs = np.concatenate([x for x, _ in chart.series.values()])
    ys = np.concatenate([y for _, y in chart.series.values()])
    if chart.y_ticks is not None:
        ys = np.array(chart.y_ticks, dtype=float)
    if chart.points:
        both = np.concatenate([xs, ys])
        low, high = _wider(min(0.0, float(both.min())), max(0.0, float(both.max())), False)
        return low, high, low, high
    x_low, x_high = _wider(float(xs.min()), float(xs.max()), chart.log_x)
    y_low, y_high = float(ys.min()), float(ys.max())
    if chart.log_y:
        y_low, y_high = _wider(y_low, y_high, True)
    elif chart.y_ticks is None:
        y_low, y_high = min(chart.y_from, y_low), max(y_high * 1.05, y_low + 1e-9)
    return x_low, x_high, y_low, y_high


def _wider(low: float, high: float, log: bool) -> tuple[float, float]:
    if log:
        return low / 1.05, max(high * 1.05, low * 1.5)
    room = 0.02 * (high - low) or 0.5
    return low - room, high + room
