"""The page of a whole reproduction: its tables, latency against load, ablation, and its runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from gimbal.core.files import read_text, structured, write_text
from gimbal.core.json_text import read_json
from gimbal.records.store import RUN_FILE
from gimbal.report.charts import Bars, Chart, Lines
from gimbal.report.page import figures, markdown, page, table
from gimbal.report.report import read_run, run_sections
from gimbal.report.svg import save_charts

RESULT_FILE, TEXT_FILE = "result.json", "report.md"
AGAINST_LOAD = {
    "ttft_mean_ms": "TTFT mean (ms)",
    "ttft_p99_ms": "TTFT P99 (ms)",
    "tpot_mean_ms": "TPOT mean (ms)",
    "throughput_rps": "throughput (requests/s)",
}
ABLATION = ("gimbal-dp", "gimbal-ep", "gimbal-no-feedback", "gimbal")
OURS, THEIRS = "here", "paper"


def write_reproduction(directory: Path, target: Path | None = None) -> Path:
    """Writes ``report.html`` and ``plots/`` for `gimbal reproduce`'s directory.

    Raises InputError when there is no finished reproduction in `directory`.
    """
    text = read_text(directory / TEXT_FILE, f"{directory}: not a finished reproduction")
    result = read_json(directory / RESULT_FILE)
    path = target or directory / "report.html"
    with structured(directory / RESULT_FILE):
        sections, charts = _sections(text, result, directory, path.parent / "plots")
    write_text(path, page(*_titled(sections)))
    save_charts(charts, path.parent / "plots")
    return path


def _sections(
    text: str, result: Mapping[str, Any], directory: Path, plots: Path
) -> tuple[list[str], list[Chart]]:
    """The page's sections and its own charts; those of its runs are written to `plots`."""
    charts: list[Chart] = []
    sections = []
    for part in ("\n" + text).split("\n## "):
        name = part.splitlines()[0].strip() if part.strip() else ""
        sections.append(markdown(part if part.startswith("\n") else "## " + part))
        if name in result["scenarios"]:
            own = scenario_charts(name, result["scenarios"][name], result["paper_ablation"])
            charts += own
            sections += [figures(own[:4]), figures(own[4:])]
            sections.append(_run(directory / name, plots / name))
    return [*sections, "<h2>Environment and seeds</h2>", _environment(result)], charts


def _titled(sections: list[str]) -> tuple[str, list[str]]:
    """The title, which the first section begins with, and the sections without it."""
    title = sections[0].partition("<h1>")[2].partition("</h1>")[0]
    return title, [sections[0].replace(f"<h1>{title}</h1>", "", 1), *sections[1:]]


def scenario_charts(
    scenario: str, tables: Mapping[str, Any], paper: Mapping[str, Mapping[str, float]]
) -> list[Chart]:
    """Four charts of latency against load, two of the ablation beside the paper's."""
    levels = tables["levels"]
    names = list(levels)
    charts: list[Chart] = []
    for metric, title in AGAINST_LOAD.items():
        series = {
            arm: (
                np.array([float(load) for load in own]),
                np.array([values[metric] for values in own.values()]),
            )
            for arm, own in levels.items()
        }
        log = metric.startswith("ttft")
        charts.append(
            Lines(f"{scenario}: {title}", "load (of vllm's capacity)", "", series, names, log_y=log)
        )
    at_knee = tables["at_knee"]["vllm-legacy"]
    arms = [arm for arm in ABLATION if arm in at_knee]
    for metric, title in (("ttft_mean_ms", "TTFT mean"), ("tpot_mean_ms", "TPOT mean")):
        ours = [_percent(at_knee[arm][metric]["change"]) for arm in arms]
        theirs = [_percent(paper[arm].get(metric)) for arm in arms]
        charts.append(
            Bars(
                f"{scenario}: {title} against vllm-legacy at load {tables['knee_load']:g}",
                "change (%)",
                [arm.removeprefix("gimbal-") for arm in arms],
                {OURS: ours, THEIRS: theirs},
                (OURS, THEIRS),
            )
        )
    return charts


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value


def _run(directory: Path, plots: Path) -> str:
    """The scenario's run that was kept request by request; its plots go to `plots`."""
    if not (directory / RUN_FILE).exists():
        return '<p class="soft">No run of this scenario was kept request by request.</p>'
    info, own = read_run(directory)
    load = (info.result or {}).get("load")
    save_charts([chart for section in own.values() for chart in section], plots)
    body = "".join(run_sections(info, own)).replace("<h2>", "<h3>").replace("</h2>", "</h3>")
    head = f"Distributions, balance and placements of one run (load {load:g})"
    return f"<details open><summary>{escape(head)}</summary>{body}</details>"


def _environment(result: Mapping[str, Any]) -> str:
    rows = [[escape(k), escape(json.dumps(v))] for k, v in result.get("environment", {}).items()]
    rows.append(["seeds", escape(", ".join(map(str, result["seeds"])))])
    rows.append(["code", escape(", ".join(result["code"]))])
    rows += [
        [f"capacity, {escape(name)}", f"{rps:.2f} requests/s"]
        for name, rps in result["capacity_rps"].items()
    ]
    return table(["", ""], rows)
