"""The plots of one run, from its records."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from gimbal.records.placements import rank_load
from gimbal.records.schema import PlacementRecord, RebalanceRecord, RequestRecord
from gimbal.records.store import RunReader
from gimbal.report.charts import Chart, FloatArray, Heat, Lines, cdf
from gimbal.report.metrics import pooled_itl_ms, samples
from gimbal.report.table import LATENCIES
from gimbal.report.window import Window

BINS = 60
"""Points in time at which the balance of a run is shown."""
MOST_MAPS = 3
"""Arms whose placements are drawn."""


def run_charts(
    reader: RunReader, names: Sequence[str], window: Window | None = None
) -> dict[str, list[Chart]]:
    """Charts by section; a section without records is empty.

    Distributions are those of `window`, if there is one.
    """
    requests = reader.requests()
    measured = requests if window is None else window.arrived(requests)
    return {
        "Distributions": distributions(measured, names),
        "Balance of the engines over time": balance(requests, names),
        "Predicted and realized gain of rearrangements": gains(reader.rebalances(), names),
        "Experts and where they lie": placements(reader.placements(), names),
    }


def distributions(requests: Sequence[RequestRecord], names: Sequence[str]) -> list[Chart]:
    """One cumulative distribution per latency; those nobody recorded are left out."""
    by_arm = {n: samples([r for r in requests if r.arm == n]) for n in names}
    charts: list[Chart] = []
    for metric, title in LATENCIES.items():
        series = {
            n: pooled_itl_ms(s) if metric == "itl_ms" else getattr(s, metric)
            for n, s in by_arm.items()
        }
        chart = cdf(f"{title}", f"{title} (ms)", series, names)
        if chart.series or metric != "itl_ms":  # a simulated run keeps no token times
            charts.append(chart)
    return charts


def balance(requests: Sequence[RequestRecord], names: Sequence[str]) -> list[Chart]:
    """Busiest over mean engine, in tokens of the requests each has taken and not finished."""
    charts: list[Chart] = []
    placed = [r for r in requests if r.engine is not None and r.last_token_s is not None]
    engines = max((r.engine for r in placed if r.engine is not None), default=0) + 1
    if engines < 2:
        return charts
    repeat = min(r.repeat for r in placed)
    series = {}
    for name in names:
        own = [r for r in placed if r.arm == name and r.repeat == repeat]
        if own:
            series[name] = busiest_over_mean(own, engines)
    charts.append(
        Lines(
            f"Tokens held, busiest engine over mean (repeat {repeat + 1})",
            "time (s)",
            "busiest / mean",
            series,
            names,
            y_from=1.0,
        )
    )
    return charts


def busiest_over_mean(
    records: Sequence[RequestRecord], engines: int
) -> tuple[FloatArray, FloatArray]:
    """([bins] seconds, [bins] ratio): means over each bin's requests in flight."""
    begin = np.array([r.sent_s for r in records])
    end = np.array([r.last_token_s for r in records], dtype=float)
    tokens = np.array([r.prompt_tokens + r.output_tokens for r in records], dtype=float)
    engine = np.array([r.engine for r in records], dtype=np.int64)
    edges = np.linspace(begin.min(), end.max(), BINS + 1)
    times, ratios = [], []
    for low, high in pairwise(edges):
        shared = np.clip(np.minimum(end, high) - np.maximum(begin, low), 0.0, None)
        held = np.bincount(engine, weights=tokens * shared, minlength=engines)
        if held.sum() > 0:
            times.append((low + high) / 2)
            ratios.append(held.max() / held.mean())
    return np.array(times), np.array(ratios)


def gains(rebalances: Sequence[RebalanceRecord], names: Sequence[str]) -> list[Chart]:
    """Each committed rearrangement as a point; on the line it did what was promised."""
    series = {}
    for name in names:
        own = [r for r in rebalances if r.arm == name and r.realized_gain_us_per_step is not None]
        if own:
            predicted = np.array([r.predicted_gain_us_per_step for r in own])
            realized = np.array([r.realized_gain_us_per_step for r in own], dtype=float)
            series[name] = predicted, realized
    if not series:
        return []
    title = "Gain of a rearrangement (µs per step)"
    return [Lines(title, "predicted", "realized", series, names, points=True)]


def placements(records: Sequence[PlacementRecord], names: Sequence[str]) -> list[Chart]:
    """Load of experts, their ranks and the ranks' load before and after, per arm."""
    charts: list[Chart] = []
    last = {name: [r for r in records if r.arm == name] for name in names}
    for name in [n for n, own in last.items() if own][:MOST_MAPS]:
        record = ([r for r in last[name] if r.committed] or last[name])[-1]
        fate = "" if record.committed else " (refused by the gain gate)"
        pairs = np.array(record.pairs)
        charts.append(
            Heat(
                f"{name}: expert load at {record.time_s:.0f} s",
                "expert",
                "layer",
                pairs,
                "load over mean",
                middle=1.0,
            )
        )
        # A map that was kept is one picture, not the same one twice.
        kept = record.ranks_before == record.ranks_after
        maps = [("before", record.ranks_before), ("after", record.ranks_after)]
        for when, ranks in [("kept", record.ranks_before)] if kept else maps:
            where = np.array(ranks, dtype=float)
            title = f"{name}: rank of each expert {when}{fate}"
            charts.append(
                Heat(title, "expert", "layer", where, "one per rank", steps=int(where.max()) + 1)
            )
        for when, ranks in [("kept", record.ranks_before)] if kept else maps:
            load = rank_load(pairs, ranks)
            title = f"{name}: load of ranks {when}{fate}"
            charts.append(Heat(title, "rank", "layer", load, "load over mean", middle=1.0))
    return charts
