"""The regimes' figures: ratios to vLLM and to the best peer of each cell, losses first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gimbal.records.schema import RequestRecord
from gimbal.report.compare import LEAST_TURNS, RATES, compare
from gimbal.report.metrics import Slo, samples, statistics
from gimbal.report.simulated import HANDOVER, report_of
from gimbal.report.table import backlog_text, unsteady
from gimbal.report.window import Window
from reproduction.paper import LOSS
from reproduction.paper_markdown import table, wrapped
from reproduction.plots import LATENCIES
from reproduction.regimes import ARMS, BASE, IDEAL, OURS, PEERS, Group, Plan

METRICS = {
    "ttft_ms.mean": "mean TTFT",
    "ttft_ms.p99": "P99 TTFT",
    "tpot_ms.mean": "mean TPOT",
    "tpot_ms.p99": "P99 TPOT",
    "e2e_ms.mean": "mean E2E",
    "throughput_rps": "requests/s",
}
HANDOVER_METRICS = {
    "prefill_ms.mean": "mean time to prefill's answer (ms)",
    "kv_wait_ms.mean": "from there to KV, mean (ms)",
    "kv_wait_ms.p99": "from there to KV, P99 (ms)",
}
"""Where prefill and decode are apart."""
PREEMPTIONS = "preemptions"
LEAST_HEADROOM = 0.02
"""By how much the ideal must be better than vLLM for a share of it to mean something."""


def group_report(group: Group, plan: Plan) -> dict[str, Any]:
    """The figures of one regime at one load.

    The best peer of a metric is the one whose value over all seeds is the lowest (of a rate: the
    highest); chosen after the fact, it is better than any one peer is.
    """
    report = report_of(group.results, ARMS, BASE, Slo(), plan.first_seed, group.window)
    runs = {name: [list(r.records) for r in group.results if r.arm == name] for name in ARMS}
    against = {
        peer: compare({peer: runs[peer], OURS: runs[OURS]}, peer, Slo(), group.window)[OURS]
        for peer in PEERS
    }
    values = {
        name: {metric: _value(arm, metric) for metric in (*METRICS, PREEMPTIONS)}
        for name, arm in report["arms"].items()
    }
    best = {metric: _best(values, metric) for metric in (*METRICS, PREEMPTIONS)}
    for name, arm in report["arms"].items():
        if set(HANDOVER) <= set(arm):
            values[name] |= {metric: _value(arm, metric) for metric in HANDOVER_METRICS}
    own = {
        "regime": group.regime.name,
        "load": group.load,
        "cluster": group.cluster,
        "trace": group.regime.trace,
        "capacity_rps": group.capacity_rps,
        "rate_rps": group.rate_rps,
        "window": report["window"],
        "requests": sum(arm["requests"] for arm in report["arms"].values()) / len(group.results),
        "unsteady": unsteady(report),
        "arms": {
            name: {"values": values[name], "backlog": backlog_text(arm)}
            for name, arm in report["arms"].items()
        },
        "runs": {name: _means(runs[name], group.window) for name in ARMS},
        "to_vllm": {
            name: {
                metric: _nested(report["ratios"][f"{name}/{BASE}"], metric) for metric in METRICS
            }
            for name in ARMS
            if name != BASE
        },
        "best_peer": best,
        "to_best_peer": {metric: against[best[metric]][metric].to_json() for metric in METRICS},
    }
    won = {metric: _won(own, metric) for metric in METRICS}
    return own | {"won": won, "behind": _behind(own)}


def _means(runs: Sequence[Sequence[RequestRecord]], window: Window | None) -> dict[str, Any]:
    """Mean latencies by seed; None where a run has none."""
    found = [samples(run if window is None else window.arrived(run)) for run in runs]
    return {
        metric: [statistics(getattr(run, metric))["mean"] for run in found] for metric in LATENCIES
    }


def _value(arm: Mapping[str, Any], metric: str) -> float | None:
    value = _nested(arm, metric)
    return None if value is None else float(value)


def _nested(values: Mapping[str, Any], metric: str) -> Any:
    name, _, statistic = metric.partition(".")
    return values[name][statistic] if statistic else values[name]


def _best(values: Mapping[str, Mapping[str, float | None]], metric: str) -> str:
    sign = -1.0 if metric in RATES else 1.0

    def height(peer: str) -> float:
        value = values[peer][metric]
        return float("inf") if value is None else sign * value

    return min(PEERS, key=height)


def _won(own: Mapping[str, Any], metric: str) -> float | None:
    """What `OURS` wins over `BASE`, as a share of what `IDEAL` does; None where that is little."""
    ours, ideal = (own["to_vllm"][name][metric]["ratio"] for name in (OURS, IDEAL))
    headroom = None if ideal is None else (ideal - 1 if metric in RATES else 1 - ideal)
    if ours is None or headroom is None or headroom < LEAST_HEADROOM:
        return None
    return float((1 - ours) / (1 - ideal))


def _behind(own: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Comparisons in which `OURS` is worse by more than `LOSS`; `lost` beyond the interval."""
    rows = []
    for metric in METRICS:
        sides = ((BASE, own["to_vllm"][OURS]), (own["best_peer"][metric], own["to_best_peer"]))
        for other, ratios in sides:
            ratio, low, high = (ratios[metric][key] for key in ("ratio", "low", "high"))
            if ratio is None or not _worse(metric, ratio):
                continue
            lost = low is not None and (high < 1 if metric in RATES else low > 1)
            rows.append({"metric": metric, "to": other, "lost": lost, **ratios[metric]})
    ours = own["arms"][OURS]["values"][PREEMPTIONS]
    for other in (BASE, own["best_peer"][PREEMPTIONS]):
        theirs = own["arms"][other]["values"][PREEMPTIONS]
        if ours > theirs:
            counts = {"ours": ours, "theirs": theirs}
            rows.append({"metric": PREEMPTIONS, "to": other, "lost": False, **counts})
    return rows


def _worse(metric: str, ratio: float) -> bool:
    return ratio < 1 - LOSS if metric in RATES else ratio > 1 + LOSS


def whole_report(
    groups: Sequence[tuple[Sequence[str], Mapping[str, Any]]],
    plan: Plan,
    environment: Mapping[str, Any],
) -> dict[str, Any]:
    """All groups' figures with what they come from.

    Args:
        groups: of each the versions of the code and its `group_report`.
    """
    return {
        "seeds": [plan.first_seed + i for i in range(plan.seeds)],
        "code": sorted({version for code, _ in groups for version in code}),
        "environment": dict(environment),
        "groups": [own for _, own in groups],
    }


def render(report: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    groups = report["groups"]
    seeds = report["seeds"]
    lines = ["# Regimes, simulated", ""]
    text = (
        f"`{OURS}` against `{BASE}` and against the best of {', '.join(PEERS)}, in steady state, "
        f"seeds {seeds[0]} to {seeds[-1]}, by `gimbal reproduce regimes` (code "
        f"{', '.join(report['code'])}). The best peer is the one with the best value of that "
        "metric in that cell. Ratios below 1 are better, of requests/s above 1. What can be won is "
        f"the distance from `{BASE}` to `{IDEAL}`, all engines one perfectly balanced pool under "
        f"Gimbal's queue; shares of it are given where it is {LEAST_HEADROOM:.0%} or more."
    )
    if len(seeds) < LEAST_TURNS:
        text += f" Fewer than {LEAST_TURNS} seeds say nothing of noise: there are no intervals."
    else:
        text += " Brackets: 95 % intervals over seeds."
    lines += [text, "", *_losses(groups), *_short(groups)]
    for own in groups:
        lines += _group(own)
    return "\n".join(map(wrapped, lines)) + "\n"


def _losses(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = [(own, row) for own in groups for row in own["behind"]]
    rows.sort(key=lambda pair: not pair[1]["lost"])
    lost, asked = sum(row["lost"] for _, row in rows), 2 * len(METRICS) * len(groups)
    lines = [
        f"## Where Gimbal loses: {lost} of {asked} comparisons beyond their interval",
        "",
        f"Behind by more than a thousandth, or with more preemptions, it is in {len(rows)}; those "
        "beyond their interval first, marked *.",
        "",
    ]
    head = ("regime", "load", "metric", "against", "ratio")
    body = [
        [
            own["regime"],
            f"{own['load']:g}",
            METRICS.get(row["metric"], row["metric"]),
            row["to"],
            _row_text(row),
        ]
        for own, row in rows
    ]
    return [*lines, *(table(head, body) if body else [])]


def _row_text(row: Mapping[str, Any]) -> str:
    if row["metric"] == PREEMPTIONS:
        return f"{row['ours']:,.0f} instead of {row['theirs']:,.0f}"
    return ratio_text(row) + ("*" if row["lost"] else "")


def _short(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """One row per regime and load: ratios to vLLM and to the best peer."""
    body = [
        [
            own["regime"],
            f"{own['load']:g}",
            *(
                f"{_two(own['to_vllm'][OURS][metric])} / {_two(own['to_best_peer'][metric])} / "
                f"{_share(own['won'][metric])}"
                for metric in METRICS
            ),
            " / ".join(
                f"{own['arms'][name]['values'][PREEMPTIONS]:,.0f}"
                for name in (OURS, BASE, own["best_peer"][PREEMPTIONS])
            ),
        ]
        for own in groups
    ]
    head = ("regime", "load", *METRICS.values(), "preemptions: ours / vllm / least of peers")
    title = "## In short: ratio to vllm / to the best peer / share of what can be won"
    return [title, "", *table(head, body)]


def _group(own: Mapping[str, Any]) -> list[str]:
    """One regime at one load: every arm's figures."""
    window = own["window"]
    span = "whole runs" if window is None else f"{window['end_s'] - window['begin_s']:,.0f} s"
    lines = [
        f"## {own['regime']}, load {own['load']:g}",
        "",
        f"Trace `{own['trace']}` on {own['cluster']}: {own['rate_rps']:.3g} requests/s of a "
        f"capacity of {own['capacity_rps']:.3g}; measured per run: {own['requests']:,.0f} requests "
        f"in {span}.",
        "",
    ]
    for text in own["unsteady"]:
        lines += [f"**{text}**", ""]
    to_vllm = [f"{name} / {BASE}" for name in own["to_vllm"]]
    head = ("", BASE, *to_vllm, f"{OURS} / best peer", f"{OURS}: won of what can be")
    body = [_metric_row(own, metric) for metric in METRICS]
    arms = [own["arms"][name] for name in (BASE, *own["to_vllm"])]
    for metric, title in HANDOVER_METRICS.items():
        if all(metric in arm["values"] for arm in arms):
            body.append([title, *(_number(arm["values"][metric]) for arm in arms), "", ""])
    counts = [f"{arm['values'][PREEMPTIONS]:,.0f}" for arm in arms]
    body.append([PREEMPTIONS, *counts, f"({own['best_peer'][PREEMPTIONS]})", ""])
    body.append(["backlog", *(arm["backlog"] for arm in arms), "", ""])
    return [*lines, *table(head, body)]


def _metric_row(own: Mapping[str, Any], metric: str) -> list[str]:
    unit = " (ms)" if "_ms" in metric else ""
    return [
        METRICS[metric] + unit,
        _number(own["arms"][BASE]["values"][metric]),
        *(ratio_text(ratios[metric]) for ratios in own["to_vllm"].values()),
        f"{ratio_text(own['to_best_peer'][metric])} ({own['best_peer'][metric]})",
        _share(own["won"][metric]),
    ]


def ratio_text(values: Mapping[str, Any]) -> str:
    """A ratio with its interval, where there is one."""
    if values["ratio"] is None or values["low"] is None:
        return _two(values)
    return f"{values['ratio']:.2f} [{values['low']:.2f}, {values['high']:.2f}]"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _two(values: Mapping[str, Any]) -> str:
    return "-" if values["ratio"] is None else f"{values['ratio']:.2f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.3g}" if value < 1000 else f"{value:,.0f}"
