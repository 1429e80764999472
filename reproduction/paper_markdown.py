"""A reproduction's report as Markdown: losses first, then the paper's tables beside ours."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from reproduction.paper import LOSS, LOWER_IS_BETTER, METRICS
from reproduction.scenarios import SCENARIOS

MOST_LOSSES = 40
WIDTH = 100
ABLATION = ("gimbal-dp", "gimbal-ep", "gimbal-no-feedback", "gimbal")


def render(report: Mapping[str, Any]) -> str:
    """The report's text; the JSON holds every loss, the text the largest."""
    lines = ["# The paper's evaluation, simulated", ""]
    size = "quick" if report["quick"] else "full"
    lines += [
        f"{report['cells']} cells ({size}), seeds {report['seeds'][0]} to {report['seeds'][-1]}. "
        "Changes are relative, negative is better except for throughput; 95 % intervals over "
        "length distributions and seeds in brackets, an asterisk where Gimbal loses beyond it.",
        "",
    ]
    lines += _losses(report) + _short(report)
    for name, tables in report["scenarios"].items():
        lines += _scenario(report, name, tables)
    return "\n".join(map(wrapped, lines)) + "\n"


def wrapped(line: str) -> str:
    """`line` with prose broken at `WIDTH`; headings and tables stay whole."""
    if line.startswith(("#", "|")):
        return line
    return textwrap.fill(line, WIDTH, break_on_hyphens=False, break_long_words=False)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    out = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return [*out, *("| " + " | ".join(row) + " |" for row in rows), ""]


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:+.1f} %"


def _change(value: Mapping[str, Any], metric: str) -> str:
    if value["change"] is None:
        return "-"
    text = _percent(value["change"])
    if value["low"] is not None:
        worst = value["low"] if metric in LOWER_IS_BETTER else -value["high"]
        text += "*" if worst > 0 and abs(value["change"]) > LOSS else ""
        text += f" [{100 * value['low']:+.1f}, {100 * value['high']:+.1f}]"
    return text


def _losses(report: Mapping[str, Any]) -> list[str]:
    rows, checked = report["losses"], report["comparisons"]
    lines = [
        f"## Where Gimbal loses: {report['lost']} of {checked} comparisons beyond their interval",
        "",
        "A comparison is one metric against one baseline at one load of one length distribution "
        "in one scenario, paired by seed; its 95 % interval is Student's t over "
        f"{len(report['seeds'])} seeds. Gimbal wins {report['won']} of them beyond the interval; "
        f"chance alone would put about {0.025 * checked:.0f} on either side. Its mean is behind "
        f"by more than a thousandth in {len(rows)}: the largest follow, those beyond their "
        "interval first, marked *.",
        "",
    ]
    body = [
        [
            row["scenario"],
            row["distribution"],
            f"{row['load']:g}",
            row["baseline"],
            METRICS[row["metric"]],
            _change(row, row["metric"]),
        ]
        for row in rows[:MOST_LOSSES]
    ]
    head = ["scenario", "lengths", "load", "baseline", "metric", "change"]
    lines += table(head, body) if body else ["None.", ""]
    if len(rows) > MOST_LOSSES:
        lines += [f"{len(rows) - MOST_LOSSES} smaller ones are in `result.json`.", ""]
    return lines


def _short(report: Mapping[str, Any]) -> list[str]:
    """Gimbal against both baselines in every scenario, where vllm-legacy begins to climb."""
    lines = ["## In short: Gimbal at the load where vllm-legacy's P99 TTFT begins to climb", ""]
    rows = [
        [name, f"{tables['knee_load']:g}", base, *_cells(tables["at_knee"][base]["gimbal"])]
        for name, tables in report["scenarios"].items()
        for base in ("vllm-legacy", "vllm")
    ]
    paper = report["paper"]["gimbal/vllm-legacy"]
    rows.append(["the paper", "", "its vLLM", *(_percent(paper.get(m)) for m in METRICS)])
    return lines + table(["scenario", "load", "against", *METRICS.values()], rows)


def _scenario(report: Mapping[str, Any], name: str, tables: Mapping[str, Any]) -> list[str]:
    knee = tables["knee_load"]
    lines = [f"## {name}", "", SCENARIOS[name].why + ".", ""]
    lines += [f"At load {knee:g}, where the P99 TTFT of vllm-legacy has begun to climb:", ""]
    rows = []
    paper = report["paper"]
    for arm, base in (("gimbal", "vllm-legacy"), ("gimbal", "vllm")):
        rows.append([f"{arm} / {base}", *_cells(tables["at_knee"][base][arm])])
    for base, values in tables["against_others"].items():
        rows.append([f"gimbal / {base}", *_cells(values)])
    for pair, values in paper.items():
        rows.append([f"paper: {pair}", *(_percent(values.get(m)) for m in METRICS)])
    lines += table(["", *METRICS.values()], rows)
    lines += [
        "Ablation at that load, against vllm-legacy; the paper's in the last columns:",
        "",
    ]
    ablation = report["paper_ablation"]
    rows = [
        [
            arm,
            *_cells(tables["at_knee"]["vllm-legacy"][arm]),
            _percent(ablation[arm]["ttft_mean_ms"]),
            _percent(ablation[arm]["tpot_mean_ms"]),
        ]
        for arm in ABLATION
    ]
    lines += table(["arm", *METRICS.values(), "paper TTFT", "paper TPOT"], rows)
    lines += ["Gimbal against today's vLLM by load:", ""]
    rows = [[load, *_cells(t["vllm"]["gimbal"])] for load, t in tables["by_load"].items()]
    lines += table(["load", *METRICS.values()], rows)
    lines += ["What the loop adds (against gimbal-no-feedback, all loads):", ""]
    rows = [[arm, *_cells(values)] for arm, values in tables["feedback_adds"].items()]
    lines += table(["arm", *METRICS.values()], rows)
    if tables["graphs_add"]:
        lines += ["What staying within CUDA graphs adds (against gimbal-no-graphs):", ""]
        rows = [[load, *_cells(values)] for load, values in tables["graphs_add"].items()]
        lines += table(["load", *METRICS.values()], rows)
    lines += _absolute(tables)
    return lines


def _cells(values: Mapping[str, Any]) -> list[str]:
    return [_change(values[metric], metric) for metric in METRICS]


def _absolute(tables: Mapping[str, Any]) -> list[str]:
    knee = f"{tables['knee_load']:g}"
    rows = []
    for arm, levels in tables["levels"].items():
        own, experts = levels[knee], tables["experts"][arm]
        rows.append(
            [
                arm,
                *(f"{own[metric]:.1f}" for metric in METRICS),
                f"{experts['rearrangements_per_run']:.1f}",
                f"{experts['stall_s_per_run']:.2f}",
                _gain(experts["predicted_gain_us_per_step"]),
                _gain(experts["realized_gain_us_per_step"]),
            ]
        )
    head = ["arm", "TTFT mean (ms)", "TPOT mean (ms)", "TTFT P99 (ms)", "requests/s"]
    head += ["rearranged per run", "stalls (s)", "predicted gain (us/step)", "realized"]
    return [
        f"Absolute figures at load {knee}, rearrangements over all loads:",
        "",
        *table(head, rows),
    ]


def _gain(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"
