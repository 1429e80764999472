"""Plots a workload's prompt lengths and arrivals. matplotlib (extra `plot`) is loaded on use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from gimbal.core.errors import InputError, one_line
from gimbal.core.files import writing
from gimbal.workloads.distributions import DISTRIBUTIONS
from gimbal.workloads.load import WorkloadOptions, build_workload
from gimbal.workloads.trace import Trace


def plot_workload(trace: Trace, options: WorkloadOptions, seed: int, path: Path) -> None:
    """`plot_traces` of the workload; of a trace without arrivals in every distribution.

    Raises InputError as `build_workload` and `plot_traces` do.
    """
    if options.distribution is None and not trace.has_arrivals:
        shapes = {name: replace(options, distribution=name) for name in DISTRIBUTIONS}
    else:
        shapes = {options.distribution or trace.name: options}
    plot_traces({name: build_workload(trace, own, seed) for name, own in shapes.items()}, path)


def plot_traces(traces: Mapping[str, Trace], path: Path) -> None:
    """Writes a figure with one row per trace: lengths (log scale) left, arrivals right.

    Raises InputError when matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("plots need matplotlib: pip install 'gimbal-moe[plot]'") from None
    figure = Figure(figsize=(10, 2.1 * len(traces) + 0.6), layout="constrained")
    axes = figure.subplots(len(traces), 2, squeeze=False)
    longest = max(int(trace.prompt_tokens.max()) for trace in traces.values())
    edges = np.geomspace(1, longest + 1, 60)
    for (left, right), (name, trace) in zip(axes, traces.items(), strict=True):
        left.hist(trace.prompt_tokens, bins=edges, color="#4269d0")
        left.set_xscale("log")
        left.set_title(
            f"{name}: mean {trace.prompt_tokens.mean():.0f}, "
            f"P50 {np.median(trace.prompt_tokens):.0f}, "
            f"P99 {np.percentile(trace.prompt_tokens, 99):.0f}",
            fontsize=9,
            loc="left",
        )
        left.set_ylabel("requests", fontsize=8)
        span = max(trace.span_s, 1e-9)
        right.hist(trace.arrivals_s, bins=np.linspace(0, span, 61), color="#efb118")
        right.set_title(
            f"{trace.rate_rps:.2f} requests/s over {span:.0f} s", fontsize=9, loc="left"
        )
    axes[-1][0].set_xlabel("prompt tokens")
    axes[-1][1].set_xlabel("arrival (s)")
    with writing(path):
        try:
            figure.savefig(path, dpi=120)
        except ValueError as error:  # an ending that names no format
            raise InputError(f"{path}: cannot be written: {one_line(error)}") from None
