"""One self-contained HTML page from a run's records: tables, ratios, plots, settings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from gimbal.core.errors import InputError
from gimbal.core.files import write_text
from gimbal.records.schema import RunInfo
from gimbal.records.store import RUN_FILE, RunReader
from gimbal.report.charts import Chart
from gimbal.report.page import beside, figures, page, table
from gimbal.report.result import check_result
from gimbal.report.run_charts import run_charts
from gimbal.report.svg import save_charts
from gimbal.report.table import (
    COUNTS,
    LATENCIES,
    RATES,
    STATISTICS,
    backlog_text,
    measured_text,
    ratios_title,
    unsteady,
    verdict,
)
from gimbal.report.window import window_of


def write_report(directory: Path, target: Path | None = None) -> Path:
    """Writes ``report.html`` and ``plots/`` for a run directory; returns the page's path.

    Raises InputError when the directory is no run, or holds no result yet, and for a page that
    cannot be written.
    """
    info, charts = read_run(directory)
    path = target or directory / "report.html"
    write_text(path, render(info, charts))
    save_charts([c for own in charts.values() for c in own], path.parent / "plots")
    return path


def read_run(directory: Path) -> tuple[RunInfo, dict[str, list[Chart]]]:
    """A run's information and its charts by section; raises InputError without a result."""
    reader = RunReader(directory)
    info = reader.info()
    if info.result is None:
        raise InputError(f"{directory}: the run has no result: it was stopped before its report")
    check_result(info.result, f"{directory / RUN_FILE}: result")
    return info, run_charts(reader, list(info.result["arms"]), window_of(info.result))


def render(info: RunInfo, charts: dict[str, list[Chart]]) -> str:
    """The page's text."""
    result = info.result or {}
    title = f"Gimbal {info.kind}: {info.trace.get('name', 'trace')}, {', '.join(result['arms'])}"
    sections = [*run_sections(info, charts), "<h2>Environment and settings</h2>", _settings(info)]
    return page(title, sections)


def run_sections(info: RunInfo, charts: dict[str, list[Chart]]) -> list[str]:
    """Tables and plots of one run."""
    result = info.result or {}
    names = list(result["arms"])
    sections = [_headline(name, ratios) for name, ratios in result["ratios"].items()]
    sections.append(_summary(info, result))
    tables = ["<h2>Arms</h2>" + _arms(result["arms"], names)]
    if result["ratios"]:
        title = f'<h2>Ratios</h2><p class="soft">{escape(ratios_title(result))}</p>'
        tables.insert(0, title + _ratios(result["ratios"]))
    sections.append(beside(tables))
    for title, own in charts.items():
        sections += [f"<h2>{escape(title)}</h2>", figures(own) if own else _missing(title)]
    return sections


def _headline(name: str, ratios: dict[str, Any]) -> str:
    """What the first arm of ``ARM/BASE`` changes, in a sentence that says what is noise."""
    arm, _, base = name.partition("/")
    found = {
        "mean TTFT": ratios["ttft_ms"]["mean"],
        "P99 TTFT": ratios["ttft_ms"]["p99"],
        "TPOT": ratios["tpot_ms"]["mean"],
    }
    said = [_change(title, values) for title, values in found.items() if values["ratio"]]
    rest = "; ".join(said) or "nothing to compare"
    return f'<p class="headline"><b>{escape(arm)} against {escape(base)}</b>: {rest}.</p>'


def _change(title: str, values: dict[str, Any]) -> str:
    ratio = values["ratio"]
    change = f"{100 * abs(ratio - 1):.0f} % {'lower' if ratio < 1 else 'higher'}"
    if values["low"] is None:
        return f"{title} {change}, without an interval"
    if not values.get("differs"):  # pages of older runs say nothing of it
        return f"{title} the same within noise ({100 * (ratio - 1):+.0f} %)"
    style = "good" if ratio < 1 else "bad"
    return f'{title} <span class="{style}">{change}</span>'


def _missing(title: str) -> str:
    return f'<p class="soft">Not recorded: this run holds no {escape(title.lower())}.</p>'


def _settings(info: RunInfo) -> str:
    rows = [[escape(str(k)), escape(json.dumps(v))] for k, v in info.environment.items()]
    rows += [["seed", str(info.seed)], ["repeats", str(info.repeats)]]
    rows += [["command", escape(" ".join(info.command))]]
    settings: dict[str, Any] = {"trace": info.trace, "arms": info.arms, "runs": info.runs}
    dump = escape(json.dumps(settings, indent=1))
    return (
        f"{table(['', ''], rows)}"
        f"<details><summary>Settings and turns</summary><pre>{dump}</pre></details>"
    )


def _summary(info: RunInfo, result: dict[str, Any]) -> str:
    parts = [f"{info.repeats} repeats", f"seed {info.seed}"]
    if result.get("rate_rps"):
        parts.append(f"{result['rate_rps']:.2f} requests/s")
    if result.get("load") and result.get("capacity_rps"):
        parts.append(f"load {result['load']:g} of {result['capacity_rps']:.2f} requests/s")
    slo = ", ".join(f"{k} ≤ {v:g}" for k, v in info.slo.items())
    parts.append(f"goodput at {slo}" if slo else "no SLO stated")
    client = result.get("client")
    if client:
        parts.append(
            f"client {client['core_share']:.1%} of a core, "
            f"{client['cpu_us_per_token']:.0f} µs per token"
        )
    if "window" in result:
        parts.append(measured_text(result))
    notes = "".join(f'<p class="bad">{escape(text)}</p>' for text in unsteady(result))
    return f'<p class="soft">{escape(" · ".join(parts))}</p>{notes}'


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _arms(arms: dict[str, Any], names: Sequence[str]) -> str:
    rows = []
    for metric, title in LATENCIES.items():
        for key, statistic in STATISTICS.items():
            cells = [_number(arms[n][metric][key]) for n in names]
            rows.append([f"{title} {statistic} (ms)", *cells])
    rows += [[title, *(_number(arms[n][m]) for n in names)] for m, title in RATES.items()]
    rows += [[key, *(str(arms[n][key]) for n in names)] for key in COUNTS]
    if any(arms[n].get("backlog") for n in names):
        rows.append(["backlog", *(backlog_text(arms[n]) for n in names)])
    even = [arms[n]["balance"]["max_over_mean"] for n in names]
    rows.append(["busiest / mean engine, tokens", *(_number(v) for v in even)])
    return table(["", *map(escape, names)], rows)


def _ratio(values: dict[str, Any], lower_is_better: bool) -> str:
    ratio, low, high = values["ratio"], values["low"], values["high"]
    if ratio is None:
        return "–"
    if low is None or high is None:
        return f"{ratio:.2f}"
    style = {"green": "good", "red": "bad", "": ""}[verdict(values, lower_is_better)]
    return f'<span class="{style}">{ratio:.2f}</span> <small>{low:.2f} to {high:.2f}</small>'


def _ratios(ratios: dict[str, Any]) -> str:
    rows = []
    for metric, title in LATENCIES.items():
        for key, statistic in STATISTICS.items():
            cells = [_ratio(r[metric][key], True) for r in ratios.values()]
            rows.append([f"{title} {statistic}", *cells])
    for metric, title in RATES.items():
        rows.append([title, *(_ratio(r[metric], False) for r in ratios.values())])
    return table(["", *map(escape, ratios)], rows)
