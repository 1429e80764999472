"""The regimes' curves over load, one line per arm: told apart by colour, dashes and marks.

Colours are Okabe and Ito's, which colour-blind people tell apart; marks and dashes do it in black
and white. Bands are 95 % intervals over seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gimbal.core.contracts import FloatArray
from gimbal.report.compare import LEAST_TURNS
from gimbal.report.plots import label_plainly, pyplot, save_figure
from gimbal.report.student import quantile

STYLES: dict[str, dict[str, Any]] = {
    "vllm": {"color": "#000000", "marker": "o", "linestyle": "-"},
    "gimbal-dp": {"color": "#0072B2", "marker": "s", "linestyle": "-", "linewidth": 2.2},
    "lmetric": {"color": "#E69F00", "marker": "^", "linestyle": "--"},
    "llm-d": {"color": "#009E73", "marker": "v", "linestyle": "-."},
    "dynamo": {"color": "#CC79A7", "marker": "D", "linestyle": ":"},
    "ideal-pool": {"color": "#777777", "marker": "x", "linestyle": (0, (5, 1, 1, 1, 1, 1))},
}
LATENCIES = {"ttft_ms": "mean TTFT, ms", "tpot_ms": "mean TPOT, ms", "e2e_ms": "mean E2E, ms"}
LEAST_MISSES = 5e-4
"""Shares beyond the limits are drawn from here on: a logarithmic axis has no zero."""
Curves = Mapping[str, Mapping[float, Sequence[float]]]
"""arm -> load -> values by seed."""


def middle_and_band(values: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Means over seeds with the ends of their 95 % intervals (Student's t).

    Args:
        values: [loads, seeds]; with fewer than `LEAST_TURNS` seeds the ends are the mean.
    """
    seeds = values.shape[1]
    mean = values.mean(axis=1)
    reach = np.zeros_like(mean)
    if seeds >= LEAST_TURNS:
        reach = quantile(seeds - 1) * values.std(axis=1, ddof=1) / seeds**0.5
    return mean, mean - reach, mean + reach


def draw_curves(axis: Any, curves: Curves, log: bool) -> None:
    """A line and a band per arm.

    Args:
        log: means are geometric; values are above 0 then.
    """
    axis.set_yscale("log")
    for name, style in STYLES.items():
        own = curves.get(name)
        if not own:
            continue
        loads = sorted(own)
        values = np.array([own[load] for load in loads])
        lines = middle_and_band(np.log(values) if log else values)
        middle, low, high = np.exp(lines) if log else np.clip(lines, LEAST_MISSES, 1.0)
        axis.fill_between(loads, low, high, color=style["color"], alpha=0.12, linewidth=0)
        axis.plot(loads, middle, label=name, **{"linewidth": 1.3, "markersize": 4} | style)


def _grid(rows: int, columns: int, sharex: Any = False) -> tuple[Any, Any]:
    plt = pyplot()
    plt.rcParams |= {"svg.hashsalt": "gimbal", "svg.fonttype": "none", "font.size": 8}
    size = (2.7 * columns + 0.4, 2.2 * rows + 0.6)
    figure, axes = plt.subplots(
        rows, columns, figsize=size, layout="constrained", squeeze=False, sharex=sharex
    )
    return figure, axes


def _finish(figure: Any, axes: Any, path: Path) -> None:
    for axis in axes.flat:
        axis.grid(color="0.9", linewidth=0.5)
    found = {
        label: handle
        for axis in axes.flat
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    names = [name for name in STYLES if name in found]
    handles = [found[name] for name in names]
    figure.legend(handles, names, loc="outside upper center", ncols=len(names), frameon=False)
    save_figure(figure, path)


def plot_regimes(groups: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Mean latencies over load: a column per regime, a row per latency, the ideal pool as a line.

    Args:
        groups: of a report (`regimes_report`), each with its ``runs``.
    """
    regimes = list(dict.fromkeys(own["regime"] for own in groups))
    figure, axes = _grid(len(LATENCIES), len(regimes), "col")
    for column, regime in enumerate(regimes):
        mine = sorted((g for g in groups if g["regime"] == regime), key=lambda g: g["load"])
        for row, (metric, label) in enumerate(LATENCIES.items()):
            axis = axes[row, column]
            curves: dict[str, dict[float, list[float]]] = {}
            for group in mine:
                for name, runs in group["runs"].items():
                    if None not in runs[metric] and min(runs[metric]) > 0.0:
                        curves.setdefault(name, {})[group["load"]] = runs[metric]
            draw_curves(axis, curves, log=True)
            label_plainly(axis.yaxis, (2, 0.6))
            if row == 0:
                axis.set_title(regime)
            if column == 0:
                axis.set_ylabel(label)
        axes[-1, column].set_xlabel("load, of vllm's capacity")
    _finish(figure, axes, path)


def plot_goodput(regimes: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Share of the requests that keep their limits over the rate, on an axis that spreads the end.

    Args:
        regimes: of a report (`goodput_report`).
    """
    columns = min(3, len(regimes))
    figure, axes = _grid(-(-len(regimes) // columns), columns)
    for axis, own in zip(axes.flat, regimes, strict=False):
        curves = {
            name: {
                load * own["capacity_rps"]: [1.0 - share for share in shares]
                for load, shares in loads.items()
            }
            for name, loads in own["attained"].items()
        }
        draw_curves(axis, curves, log=False)
        for miss in (0.01, 0.1):
            axis.axhline(miss, color="0.5", linewidth=0.8)
        axis.set_ylim(1.0, LEAST_MISSES)
        ticks = (1.0, 0.5, 0.1, 0.01, 0.001)
        axis.set_yticks(ticks, [f"{1.0 - miss:.4g}".replace("0.", ".", 1) for miss in ticks])
        axis.minorticks_off()
        limits = ", ".join(f"{k[:-3].upper()} {v:,.0f} ms" for k, v in own["slo"].items())
        axis.set_title(f"{own['regime']}: {limits}", fontsize=8)
        axis.set_xlabel("requests/s")
    for axis in axes.flat[len(regimes) :]:
        axis.set_axis_off()
    for row in axes:
        row[0].set_ylabel("share within limits")
    _finish(figure, axes, path)
