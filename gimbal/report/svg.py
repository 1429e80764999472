"""Charts as SVG text, so that a report is one file and needs no plotting library."""

from __future__ import annotations

import base64
import math
import re
import struct
import zlib
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gimbal.core.files import write_text, writing
from gimbal.report.charts import (
    COLOURS,
    Bars,
    Chart,
    FloatArray,
    Heat,
    Lines,
    colour_of,
    limits,
    linear_ticks,
    log_ticks,
)

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 460, 290, 50, 14, 42, 40
STANDALONE = (
    "svg{font:12px system-ui,sans-serif;background:#fff;color:#222}text{fill:currentColor}"
    ".grid{stroke:#8884}.soft{fill:#777}"
)
Scale = Callable[[float], float]


def draw(chart: Chart) -> str:
    """The chart as an ``svg`` element, styled by the page; a sentence when it has no data."""
    if isinstance(chart, Heat):
        return _svg(chart.title, _heat(chart)) if chart.values.size else _empty(chart.title)
    if isinstance(chart, Bars):
        return (
            _svg(chart.title, _bars(chart)) if any(chart.series.values()) else _empty(chart.title)
        )
    return _svg(chart.title, _lines(chart)) if chart.series else _empty(chart.title)


def standalone(chart: Chart) -> str:
    """The chart as an SVG file, with a legend."""
    inner = draw(chart)
    if not inner.startswith("<svg"):
        return f'<svg xmlns="http://www.w3.org/2000/svg"><text y="20">{inner}</text></svg>'
    names = [] if isinstance(chart, Heat) else list(chart.series)
    rows = "".join(
        f'<rect x="{LEFT + 140 * (i % 3)}" y="{HEIGHT + 16 * (i // 3)}" width="11" height="9" '
        f'fill="{colour_of(chart.names, name)}"/>'  # type: ignore[union-attr]
        f'<text x="{LEFT + 16 + 140 * (i % 3)}" y="{HEIGHT + 9 + 16 * (i // 3)}">{escape(name)}'
        "</text>"
        for i, name in enumerate(names)
    )
    height = HEIGHT + 16 * math.ceil(len(names) / 3) + 6
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{2 * WIDTH}" height="{2 * height}" '
        f'viewBox="0 0 {WIDTH} {height}"><style>{STANDALONE}</style>'
    )
    body = inner[inner.index(">") + 1 : -len("</svg>")]
    return f"{head}{body}{rows}</svg>"


def save_charts(charts: Sequence[Chart], directory: Path) -> list[Path]:
    """Writes every chart as an SVG file named after its title; returns the paths.

    Files of an earlier report in `directory` are replaced by name. Raises InputError where they
    cannot be written.
    """
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    for chart in charts:
        path = directory / (re.sub(r"[^a-z0-9.]+", "-", chart.title.lower()).strip("-") + ".svg")
        while path in written:
            path = path.with_name(f"{path.stem}-more.svg")
        write_text(path, standalone(chart))
        written.append(path)
    return written


def _svg(title: str, body: str) -> str:
    text = escape(title)
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{text}">'
        f'<text x="{LEFT}" y="14" font-weight="600">{text}</text>{body}</svg>'
    )


def _empty(title: str) -> str:
    return f'<p class="soft">{escape(title)}: not recorded</p>'


def _axes(
    x_ticks: list[tuple[float, str]], y_ticks: list[tuple[float, str]], x_label: str, y_label: str
) -> str:
    """Grid and labels; ticks are (position, text)."""
    foot, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = []
    for y, text in y_ticks:
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{escape(text)}</text>'
        )
    for x, text in x_ticks:
        parts.append(
            f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{foot}"/>'
            f'<text x="{x:.1f}" y="{foot + 15}" text-anchor="middle">{escape(text)}</text>'
        )
    middle = (WIDTH - RIGHT + LEFT) / 2
    parts.append(
        f'<text x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>'
        f'<text class="soft" x="{LEFT}" y="{TOP - 11}">{escape(y_label)}</text>'
    )
    return "".join(parts)


def _scale(low: float, high: float, begin: float, end: float, log: bool) -> Scale:
    """From low..high to begin..end."""
    if log:
        low, high = math.log10(low), math.log10(high)
    width = (high - low) or 1.0

    def place(value: float) -> float:
        at = math.log10(value) if log else value
        return begin + (at - low) / width * (end - begin)

    return place


def _lines(chart: Lines) -> str:
    x_low, x_high, y_low, y_high = limits(chart)
    x_of = _scale(x_low, x_high, LEFT, WIDTH - RIGHT, chart.log_x)
    y_of = _scale(y_low, y_high, HEIGHT - BOTTOM, TOP, chart.log_y)
    xs = (log_ticks if chart.log_x else linear_ticks)(x_low, x_high)
    ys = chart.y_ticks or (log_ticks if chart.log_y else linear_ticks)(y_low, y_high)
    parts = [
        _axes(
            [(x_of(x), f"{x:g}") for x in xs],
            [(y_of(y), f"{y * 100:g}%" if chart.percent_y else _short(y)) for y in ys],
            chart.x_label,
            chart.y_label,
        )
    ]
    if chart.points:
        ends = [f'{a}1="{x_of(x_low):.1f}" {a}2="{x_of(x_high):.1f}"' for a in "x"]
        parts.append(
            f'<line class="grid" {ends[0]} y1="{y_of(y_low):.1f}" y2="{y_of(y_high):.1f}"/>'
        )
    for name, (x, y) in chart.series.items():
        colour = colour_of(chart.names, name)
        places = [(x_of(float(a)), y_of(float(b))) for a, b in zip(x, y, strict=True)]
        if chart.points or len(places) <= 12:
            parts += [
                f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{colour}"/>' for a, b in places
            ]
        if not chart.points:
            text = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
            parts.append(
                f'<polyline fill="none" stroke="{colour}" stroke-width="1.8" points="{text}">'
                f"<title>{escape(name)}</title></polyline>"
            )
    return "".join(parts)


def _bars(chart: Bars) -> str:
    values = [v for own in chart.series.values() for v in own if v is not None]
    low, high = min(0.0, *values), max(0.0, *values)
    room = 0.06 * ((high - low) or 1.0)
    low, high = low - room * (low < 0), high + room * (high > 0)
    y_of = _scale(low, high, HEIGHT - BOTTOM, TOP, False)
    wide = (WIDTH - LEFT - RIGHT) / len(chart.groups)
    bar = 0.8 * wide / len(chart.series)
    centres = [(LEFT + (i + 0.5) * wide, name) for i, name in enumerate(chart.groups)]
    ticks = [(y_of(v), _short(v)) for v in linear_ticks(low, high)]
    parts = [_axes(centres, ticks, "", chart.y_label)]
    for at, (name, own) in enumerate(chart.series.items()):
        for (centre, group), value in zip(centres, own, strict=True):
            if value is None:
                continue
            top, foot = sorted((y_of(value), y_of(0.0)))
            x = centre - 0.4 * wide + at * bar
            parts.append(
                f'<rect x="{x:.1f}" y="{top:.1f}" width="{bar:.1f}" height="{foot - top:.1f}" '
                f'fill="{colour_of(chart.names, name)}"><title>{escape(name)}, {escape(group)}: '
                f"{value:.1f}</title></rect>"
            )
    return "".join(parts)


def _heat(chart: Heat) -> str:
    rows, columns = chart.values.shape
    pixels, low, high = heat_colours(chart)
    data = base64.b64encode(png(pixels)).decode()
    x_of = _scale(0, columns, LEFT, WIDTH - RIGHT, False)
    y_of = _scale(0, rows, TOP, HEIGHT - BOTTOM, False)
    label = f"{chart.unit}: {low:.2g} (blue) to {high:.2g} (red)"
    if chart.steps:
        label = chart.unit
    axes = _axes(
        [(x_of(v + 0.5), f"{v:g}") for v in linear_ticks(0, columns - 1) if v == int(v)],
        [(y_of(v + 0.5), f"{v:g}") for v in linear_ticks(0, rows - 1) if v == int(v)],
        f"{chart.x_label}; colour: {label}",
        chart.y_label,
    )
    return (
        f'{axes}<image x="{LEFT}" y="{TOP}" width="{WIDTH - LEFT - RIGHT}" '
        f'height="{HEIGHT - TOP - BOTTOM}" preserveAspectRatio="none" '
        f'style="image-rendering:pixelated" href="data:image/png;base64,{data}"/>'
    )


def heat_colours(chart: Heat) -> tuple[npt.NDArray[np.uint8], float, float]:
    """([rows, columns, 3] colours, value of the bluest, value of the reddest)."""
    if chart.steps:
        table = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in COLOURS])
        return table[chart.values.astype(int) % len(table)].astype(np.uint8), 0.0, 0.0
    middle = float(np.mean(chart.values)) if chart.middle is None else chart.middle
    reach = max(float(np.abs(chart.values - middle).max()), 1e-9)
    # Most of the colour for most of the cells: a few hot experts must not bleach the rest.
    reach = max(float(np.percentile(np.abs(chart.values - middle), 99)), 0.02 * reach)
    share: FloatArray = np.clip((chart.values - middle) / reach, -1.0, 1.0)[..., None]
    white, red, blue = np.array([245, 245, 245]), np.array([178, 24, 43]), np.array([33, 102, 172])
    colours = white + np.abs(share) * (np.where(share > 0, red, blue) - white)
    low = max(middle - reach, float(chart.values.min()))
    return colours.astype(np.uint8), low, middle + reach


def png(pixels: npt.NDArray[np.uint8]) -> bytes:
    """[rows, columns, 3] as a PNG file (RFC 2083: IHDR, one IDAT without filters, IEND)."""
    rows, columns, _ = pixels.shape
    lines = np.concatenate([np.zeros((rows, 1), np.uint8), pixels.reshape(rows, -1)], axis=1)

    def chunk(kind: bytes, body: bytes) -> bytes:
        check = zlib.crc32(kind + body)
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", check)

    head = struct.pack(">IIBBBBB", columns, rows, 8, 2, 0, 0, 0)
    body = zlib.compress(lines.tobytes(), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def _short(value: float) -> str:
    return f"{value / 1000:g}k" if abs(value) >= 10_000 else f"{value:.4g}"
