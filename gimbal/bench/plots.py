"""Plots of measurements (matplotlib, the extra ``plot``)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gimbal.core.errors import InputError


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
    """Predicted against measured step times on log axes, with the diagonal."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(5.5, 5), layout="constrained")
    axes.scatter(measured_ms, predicted_ms, s=6, alpha=0.35, edgecolors="none")
    limits = [min(measured_ms) * 0.9, max(measured_ms) * 1.1]
    axes.plot(limits, limits, color="0.4", linewidth=1)
    axes.set(
        xscale="log",
        yscale="log",
        xlim=limits,
        ylim=limits,
        xlabel="measured step time, ms",
        ylabel="predicted step time, ms",
        title=f"{len(measured_ms)} steps",
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)
