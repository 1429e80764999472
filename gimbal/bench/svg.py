"""Small line charts as SVG text, so that a report is one file without a plotting library."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
Scale = Callable[[float], float]
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
WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 520, 260, 44, 36, 10
MAX_POINTS = 400


def colour_of(names: Sequence[str], name: str) -> str:
    """The colour of `name` in every chart of one report."""
    return COLOURS[list(names).index(name) % len(COLOURS)]


def cdf_chart(series: Mapping[str, FloatArray], unit: str, names: Sequence[str]) -> str:
    """Cumulative distributions on a logarithmic axis; values <= 0 are left out."""
    kept = {n: np.sort(v[np.isfinite(v) & (v > 0)]) for n, v in series.items()}
    kept = {n: v for n, v in kept.items() if len(v)}
    if not kept:
        return "<p>no completed request</p>"
    low = math.log10(min(float(v[0]) for v in kept.values()))
    high = math.log10(max(float(v[-1]) for v in kept.values()))
    high = max(high, low + 0.1)

    def x_of(value: float) -> float:
        return LEFT + (math.log10(value) - low) / (high - low) * (WIDTH - LEFT - 12)

    def y_of(share: float) -> float:
        return TOP + (1 - share) * (HEIGHT - TOP - BOTTOM)

    parts = [_grid(low, high, unit, x_of, y_of)]
    for name, values in kept.items():
        picked = np.unique(
            np.linspace(0, len(values) - 1, min(MAX_POINTS, len(values))).astype(int)
        )
        points = " ".join(
            f"{x_of(float(values[i])):.1f},{y_of((i + 1) / len(values)):.1f}" for i in picked
        )
        parts.append(
            f'<polyline fill="none" stroke="{colour_of(names, name)}" stroke-width="1.8" '
            f'points="{points}"><title>{escape(name)}</title></polyline>'
        )
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="distribution in {unit}">'
        + "".join(parts)
        + "</svg>"
    )


def _grid(low: float, high: float, unit: str, x_of: Scale, y_of: Scale) -> str:
    """Lines at shares of the requests, and at 1, 2, 5 of every decade."""
    lines = []
    for share in (0, 0.25, 0.5, 0.75, 0.9, 1):
        y = y_of(share)
        lines.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - 12}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{share * 100:g}%</text>'
        )
    for decade in range(math.floor(low), math.ceil(high) + 1):
        for step in (1, 2, 5):
            value = step * 10.0**decade
            if not low <= math.log10(value) <= high:
                continue
            x = x_of(value)
            foot = HEIGHT - BOTTOM
            lines.append(
                f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{foot}"/>'
                f'<text x="{x:.1f}" y="{foot + 15}" text-anchor="middle">{value:g}</text>'
            )
    middle = (WIDTH + LEFT) / 2
    lines.append(f'<text x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">{escape(unit)}</text>')
    return "".join(lines)
