"""Plots of measurements (matplotlib, the extra ``plot``)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from gimbal.core.errors import InputError
from gimbal.report.charts import Bars, Chart, Heat, Lines, colour_of, limits, log_ticks
from gimbal.report.svg import heat_colours, standalone

SHOWN_STEPS = 800
FIT_BINS = 14


def pyplot() -> Any:
    """matplotlib's pyplot without a display; raises InputError naming the extra."""
    try:
        import matplotlib
    except ImportError:
        raise InputError("plots need matplotlib: pip install 'gimbal-moe[plot]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def plot_fit(measured_ms: Sequence[float], predicted_ms: Sequence[float], path: Path) -> None:
    """Predicted against measured step times: a sample of steps, and means and spread by bin.

    The bins are of predicted time: a mean on the diagonal says that steps like these are right on
    average, the bar (10th to 90th percentile) how much the machine itself scatters.
    """
    plt = pyplot()
    measured, predicted = np.asarray(measured_ms), np.asarray(predicted_ms)
    figure, axes = plt.subplots(figsize=(5.5, 5), layout="constrained")
    shown = slice(None, None, max(1, len(measured) // SHOWN_STEPS))
    axes.scatter(predicted[shown], measured[shown], s=5, alpha=0.3, edgecolors="none")
    edges = np.quantile(predicted, np.linspace(0, 1, FIT_BINS + 1))
    which = np.clip(np.searchsorted(edges, predicted, side="right") - 1, 0, FIT_BINS - 1)
    for part in (which == b for b in range(FIT_BINS)):
        if part.any():
            x, mean = predicted[part].mean(), measured[part].mean()
            low, high = np.quantile(measured[part], [0.1, 0.9])
            axes.plot([x, x], [low, high], color="C1", linewidth=1.5)
            axes.plot([x], [mean], "o", color="C1", markersize=5)
    ends = [np.quantile(measured, 0.001) * 0.9, np.quantile(measured, 0.999) * 1.1]
    axes.plot(ends, ends, color="0.4", linewidth=1)
    axes.set(
        xscale="log",
        yscale="log",
        xlim=ends,
        ylim=ends,
        xlabel="predicted step time, ms",
        ylabel="measured step time, ms",
        title=f"{len(measured)} steps; means and 10 to 90 % by bin",
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)


def save_charts(charts: Sequence[Chart], directory: Path) -> list[Path]:
    """Writes every chart as SVG, and as PNG where matplotlib is installed; returns the paths.

    Files of an earlier report in `directory` are replaced by name.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with_png = find_spec("matplotlib") is not None
    written, taken = [], set()
    for chart in charts:
        stem = re.sub(r"[^a-z0-9.]+", "-", chart.title.lower()).strip("-")
        while stem in taken:
            stem += "-more"
        taken.add(stem)
        path = directory / f"{stem}.svg"
        path.write_text(standalone(chart), encoding="utf-8")
        written.append(path)
        if with_png:
            written.append(directory / f"{stem}.png")
            _save_png(chart, written[-1])
    return written


def _save_png(chart: Chart, path: Path) -> None:
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    if isinstance(chart, Heat):
        _draw_heat(axes, figure, chart)
    elif isinstance(chart, Bars):
        _draw_bars(axes, chart)
    else:
        _draw_lines(axes, chart)
    axes.set_title(chart.title)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw_lines(axes: Any, chart: Lines) -> None:
    if not chart.series:
        axes.text(0.5, 0.5, "not recorded", ha="center", transform=axes.transAxes)
        return
    for name, (x, y) in chart.series.items():
        style = {"linestyle": "none", "marker": "o"} if chart.points else {"linewidth": 1.5}
        marks = {} if chart.points or len(x) > 12 else {"marker": "o", "markersize": 3}
        axes.plot(x, y, label=name, color=colour_of(chart.names, name), **style, **marks)
    if chart.points:
        axes.axline((0, 0), slope=1, color="0.7", linewidth=0.8)
    x_low, x_high, y_low, y_high = limits(chart)
    for axis, log, low, high in (
        ("x", chart.log_x, x_low, x_high),
        ("y", chart.log_y, y_low, y_high),
    ):
        if log:
            ticks = log_ticks(low, high)
            axes.set(**{f"{axis}scale": "log", f"{axis}lim": (low, high)})
            axes.set(**{f"{axis}ticks": ticks, f"{axis}ticklabels": [f"{t:g}" for t in ticks]})
            getattr(axes, f"{axis}axis").minorticks_off()
    axes.set(xlabel=chart.x_label, ylabel=chart.y_label)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="upper left")


def _draw_bars(axes: Any, chart: Bars) -> None:
    width = 0.8 / len(chart.series)
    for at, (name, values) in enumerate(chart.series.items()):
        present = [(i, v) for i, v in enumerate(values) if v is not None]
        places = [i - 0.4 + (at + 0.5) * width for i, _ in present]
        colour = colour_of(chart.names, name)
        axes.bar(places, [v for _, v in present], width, label=name, color=colour)
    axes.set_xticks(range(len(chart.groups)), chart.groups)
    axes.axhline(0, color="0.4", linewidth=0.8)
    axes.set_ylabel(chart.y_label)
    axes.legend(fontsize=8)


def _draw_heat(axes: Any, figure: Any, chart: Heat) -> None:
    colours, low, high = heat_colours(chart)
    axes.imshow(colours, aspect="auto", interpolation="nearest")
    axes.set(xlabel=chart.x_label, ylabel=chart.y_label)
    note = chart.unit if chart.steps else f"{chart.unit}: {low:.2g} (blue) to {high:.2g} (red)"
    figure.text(0.99, 0.01, note, ha="right", fontsize=8)
