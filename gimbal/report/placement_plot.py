"""Plots of a planned placement (matplotlib, the extra ``plot``)."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gimbal.core.contracts import FloatArray, IntArray, Topology
from gimbal.core.placement.objective import pair_loads
from gimbal.report.plots import pyplot, save_figure


def plot_placement(
    counts: FloatArray, before: IntArray, after: IntArray, topology: Topology, path: Path
) -> None:
    """Rank load over the mean per layer before and after, and who asks for which expert.

    The heat map shows layer 0: rows are sources, columns experts in the order of the planned
    slots, so that a source-aware plan shows as blocks on the diagonal.
    """
    plt = pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(15, 5), layout="constrained")
    loads = [pair_loads(p, counts.sum(axis=0), topology) for p in (before, after)]
    relative = [load / np.maximum(load.mean(axis=1, keepdims=True), 1e-300) for load in loads]
    reach = max(0.05, max(float(np.abs(r - 1.0).max()) for r in relative))
    for axis, data, name in zip(axes, relative, ("before", "after"), strict=False):
        image = axis.imshow(data, aspect="auto", cmap="RdBu_r", vmin=1 - reach, vmax=1 + reach)
        axis.set(title=f"rank load over mean, {name}", xlabel="rank", ylabel="layer")
    figure.colorbar(image, ax=axes[:2], shrink=0.8)
    asked = counts[:, 0, :] / np.maximum(counts[:, 0, :].sum(axis=1, keepdims=True), 1e-300)
    image = axes[2].imshow(asked[:, after[0]], aspect="auto", cmap="viridis")
    for rank in range(1, topology.ranks):
        axes[2].axvline(rank * topology.slots_per_rank - 0.5, color="white", linewidth=0.6)
    axes[2].set(
        title="share of a source's pairs, layer 0",
        xlabel="slot after (lines: ranks)",
        ylabel="source",
    )
    figure.colorbar(image, ax=axes[2], shrink=0.8)
    save_figure(figure, path)
