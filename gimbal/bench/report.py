"""One self-contained HTML page from a run's records: tables, ratios, distributions, settings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from gimbal.bench.metrics import pooled_itl_ms, samples
from gimbal.bench.svg import cdf_chart, colour_of
from gimbal.bench.table import COUNTS, LATENCIES, RATES, STATISTICS
from gimbal.core.errors import InputError
from gimbal.records.schema import RequestRecord, RunInfo
from gimbal.records.store import RunReader

STYLE = """
:root{color-scheme:light dark;--line:#8884;--soft:#888}
body{font:15px/1.45 system-ui,sans-serif;max-width:1120px;margin:2em auto;padding:0 1em}
h1{font-size:1.5em}h2{font-size:1.15em;margin-top:2em}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;display:block;overflow-x:auto}
td,th{padding:.2em .7em;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
td:first-child,th:first-child{text-align:left}
.good{color:#2a9d4a}.bad{color:#d64545}.soft{color:var(--soft)}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(420px,1fr));gap:1em}
svg{width:100%;font:11px system-ui}svg text{fill:currentColor}.grid{stroke:var(--line)}
.key span{display:inline-block;width:1em;height:.7em;margin:0 .4em 0 1em;border-radius:2px}
pre{white-space:pre-wrap;overflow-wrap:anywhere}
"""


def write_report(directory: Path, target: Path | None = None) -> Path:
    """Writes ``report.html`` for a run directory and returns its path.

    Raises InputError when the directory is no run, or holds no result yet.
    """
    reader = RunReader(directory)
    info = reader.info()
    if info.result is None:
        raise InputError(f"{directory}: the run has no result: it was stopped before its report")
    path = target or directory / "report.html"
    path.write_text(render(info, reader.requests()), encoding="utf-8")
    return path


def render(info: RunInfo, requests: Sequence[RequestRecord]) -> str:
    """The page's text."""
    result = info.result or {}
    names = list(result["arms"])
    title = f"Gimbal {info.kind}: {info.trace.get('name', 'trace')}, {', '.join(names)}"
    sections = [
        f"<h1>{escape(title)}</h1>",
        _summary(info, result),
        "<h2>Arms</h2>",
        _arms(result["arms"], names),
    ]
    if result["ratios"]:
        sections += ["<h2>Ratios with 95 % intervals</h2>", _ratios(result["ratios"])]
    sections += ["<h2>Distributions</h2>", _charts(requests, names)]
    settings: dict[str, Any] = {"command": info.command, "trace": info.trace, "arms": info.arms}
    settings |= {"environment": info.environment, "runs": info.runs}
    dump = escape(json.dumps(settings, indent=1))
    sections.append(f"<details><summary>Settings and turns</summary><pre>{dump}</pre></details>")
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{STYLE}</style>{''.join(sections)}</html>"
    )


def _summary(info: RunInfo, result: dict[str, Any]) -> str:
    parts = [f"{info.repeats} repeats", f"seed {info.seed}"]
    if result.get("rate_rps"):
        parts.append(f"{result['rate_rps']:.2f} requests/s")
    if result.get("load"):
        parts.append(f"load {result['load']:g} of {result['capacity_rps']:.2f} requests/s")
    slo = ", ".join(f"{k} ≤ {v:g}" for k, v in info.slo.items())
    parts.append(f"goodput at {slo}" if slo else "no SLO stated")
    client = result.get("client")
    if client:
        parts.append(
            f"client {client['core_share']:.1%} of a core, "
            f"{client['cpu_us_per_token']:.0f} µs per token"
        )
    return f'<p class="soft">{escape(" · ".join(parts))}</p>'


def _row(head: str, cells: Sequence[str]) -> str:
    return f"<tr><td>{head}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _head(names: Sequence[str]) -> str:
    return f"<tr><th></th>{''.join(f'<th>{escape(n)}</th>' for n in names)}</tr>"


def _arms(arms: dict[str, Any], names: Sequence[str]) -> str:
    rows = [_head(names)]
    for metric, title in LATENCIES.items():
        for key, statistic in STATISTICS.items():
            cells = [_number(arms[n][metric][key]) for n in names]
            rows.append(_row(f"{title} {statistic} (ms)", cells))
    rows += [_row(title, [_number(arms[n][m]) for n in names]) for m, title in RATES.items()]
    rows += [_row(key, [str(arms[n][key]) for n in names]) for key in COUNTS]
    even = [arms[n]["balance"]["max_over_mean"] for n in names]
    rows.append(_row("busiest / mean engine, tokens", [_number(v) for v in even]))
    return f"<table>{''.join(rows)}</table>"


def _ratio(values: dict[str, float | None], lower_is_better: bool) -> str:
    ratio, low, high = values["ratio"], values["low"], values["high"]
    if ratio is None:
        return "–"
    if low is None or high is None:
        return f"{ratio:.2f}"
    style = ""
    if high < 1 or low > 1:
        style = "good" if (high < 1) == lower_is_better else "bad"
    return f'<span class="{style}">{ratio:.2f}</span> <small>{low:.2f} to {high:.2f}</small>'


def _ratios(ratios: dict[str, Any]) -> str:
    rows = [_head(list(ratios))]
    for metric, title in LATENCIES.items():
        for key, statistic in STATISTICS.items():
            cells = [_ratio(r[metric][key], True) for r in ratios.values()]
            rows.append(_row(f"{title} {statistic}", cells))
    for metric, title in RATES.items():
        rows.append(_row(title, [_ratio(r[metric], False) for r in ratios.values()]))
    return f"<table>{''.join(rows)}</table>"


def _charts(requests: Sequence[RequestRecord], names: Sequence[str]) -> str:
    by_arm = {n: samples([r for r in requests if r.arm == n]) for n in names}
    charts = []
    for metric, title in LATENCIES.items():
        series = {
            n: pooled_itl_ms(s) if metric == "itl_ms" else getattr(s, metric)
            for n, s in by_arm.items()
        }
        charts.append(f"<div>{cdf_chart(series, f'{title} (ms)', names)}</div>")
    keys = "".join(
        f'<span style="background:{colour_of(names, n)}"></span>{escape(n)}' for n in names
    )
    return f'<p class="key">{keys}</p><div class="charts">{"".join(charts)}</div>'
