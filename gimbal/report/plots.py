"""Figures that one command draws when asked (matplotlib, the extra ``plot``).

The charts of a report are drawn without it: see `svg`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gimbal.core.errors import InputError, one_line
from gimbal.core.files import writing

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


def save_figure(figure: Any, path: Path) -> None:
    """Writes and closes a figure; raises InputError for a file it cannot write."""
    try:
        with writing(path):
            figure.savefig(path, dpi=150)
    except ValueError as error:  # an ending that names no format
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: cannot be written: {one_line(error)}") from None
    finally:
        pyplot().close(figure)


def label_plainly(axis: Any, minor_thresholds: tuple[float, float]) -> None:
    """Labels a logarithmic axis 20,000 and 0.3, not 2e+04 (which is 22,000 too) and 3e-01.

    Args:
        axis: matplotlib's, the x or the y of a plot.
        minor_thresholds: see matplotlib's `LogFormatter`.
    """
    from matplotlib.ticker import LogFormatter

    class PlainNumbers(LogFormatter):
        def __call__(self, x: float, pos: int | None = None) -> str:
            return f"{x:,g}" if super().__call__(x, pos) else ""

    plain = PlainNumbers(labelOnlyBase=False, minor_thresholds=minor_thresholds)
    axis.set_major_formatter(plain)
    axis.set_minor_formatter(plain)


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
    save_figure(figure, path)
