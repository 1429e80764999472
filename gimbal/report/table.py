"""The report on a terminal: arms side by side, then ratios; losers as visible as winners."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from gimbal.report.compare import LEAST_TURNS
from gimbal.report.window import Window, window_of

LATENCIES = {"ttft_ms": "TTFT", "tpot_ms": "TPOT", "itl_ms": "ITL", "e2e_ms": "E2E"}
STATISTICS = {"mean": "mean", "p50": "P50", "p90": "P90", "p99": "P99"}
HANDOVER = {"prefill_ms": "to prefill's answer", "kv_wait_ms": "from there to KV"}
"""With prefill apart; the rest of TTFT is the decode engine's."""
RATES = {
    "throughput_rps": "requests/s",
    "output_tokens_per_s": "output tokens/s",
    "goodput_rps": "goodput/s",
}
COUNTS = ("requests", "completed", "rejected", "failed", "aborted")
LABEL, ARM_CELL, RATIO_CELL = 28, 10, 20
"""Characters of a row's label, of one figure, and of one ratio with its interval."""
MAX_SEND_LAG_MS = 50.0
MAX_CPU_WAIT_SHARE = 0.02
LONG_STAY = 1.5
"""P99 of the time that requests stay, in times of what runs before they are measured."""


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _arms_table(arms: dict[str, Any]) -> Table:
    table = Table(title="Arms (latencies in ms)", title_justify="left")
    table.add_column("", no_wrap=True)
    for name in arms:
        table.add_column(name, justify="right")
    for metric, title in LATENCIES.items():
        for key, statistic in STATISTICS.items():
            values = [_number(arm[metric][key]) for arm in arms.values()]
            table.add_row(f"{title} {statistic}", *values, end_section=key == "p99")
    for metric, title in HANDOVER.items():
        if all(metric in arm for arm in arms.values()):
            for key, statistic in STATISTICS.items():
                values = [_number(arm[metric][key]) for arm in arms.values()]
                table.add_row(f"{title} {statistic}", *values, end_section=key == "p99")
    for metric, title in RATES.items():
        table.add_row(title, *(_number(arm[metric]) for arm in arms.values()))
    for key in COUNTS:
        values = [str(arm[key]) for arm in arms.values()]
        style = "red" if key not in ("requests", "completed") and set(values) != {"0"} else None
        table.add_row(key, *values, style=style)
    for key, title in (("balance", "tokens"), ("requests_by_engine", "requests")):
        spread = [arm[key]["max_over_mean"] for arm in arms.values()]
        cells = ["-" if s is None else f"{s:.2f}" for s in spread]
        table.add_row(f"{title}, max/mean engine", *cells)
    if any(arm.get("backlog") for arm in arms.values()):
        table.add_row("backlog", *(backlog_text(arm) for arm in arms.values()))
    hits = [arm["prefix_hit_rate"] for arm in arms.values()]
    table.add_row("prefix cache hits", *("-" if h is None else f"{h:.1%}" for h in hits))
    return table


def backlog_text(arm: dict[str, Any]) -> str:
    """Whether what an arm leaves unfinished stays bounded while it is measured."""
    backlog = arm.get("backlog")
    if not backlog:
        return "-"
    if not backlog["bounded"]:
        return f"grows {backlog['growth']:.0%}"
    return f"falls {-backlog['growth']:.0%}" if backlog["falls"] else "bounded"


def _ratio_cell(values: dict[str, Any], lower_is_better: bool) -> Text:
    ratio, low, high = values["ratio"], values["low"], values["high"]
    if ratio is None:
        return Text("-")
    if low is None or high is None:
        return Text(f"{ratio:.2f}")
    return Text(f"{ratio:.2f} [{low:.2f}, {high:.2f}]", style=verdict(values, lower_is_better))


def verdict(values: dict[str, Any], lower_is_better: bool) -> str:
    """``green`` for a gain, ``red`` for a loss, nothing where no difference is known."""
    if not values.get("differs"):
        return ""
    return "green" if (values["ratio"] < 1) == lower_is_better else "red"


def ratios_title(report: dict[str, Any]) -> str:
    """What the ratios of a report are, and what their intervals are worth."""
    if any(cell["low"] is not None for cell in _cells(report["ratios"])):
        return "Ratios, 95 % intervals; coloured: a difference even with all rows asked at once"
    return (
        f"Ratios without intervals: fewer than {LEAST_TURNS} turns of an arm say nothing of noise "
        f"(--repeat {LEAST_TURNS})"
    )


def _cells(ratios: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for own in ratios.values():
        for metric in (*LATENCIES, *RATES):
            found = own[metric]
            yield from [found] if "ratio" in found else found.values()


def _ratios_table(ratios: dict[str, Any]) -> Table:
    table = Table(
        title="Ratios (below 1 is better for times, above 1 for rates)", title_justify="left"
    )
    table.add_column("", no_wrap=True)
    for name in ratios:
        table.add_column(name, justify="right")
    for metric, title in LATENCIES.items():
        for key, statistic in STATISTICS.items():
            cells = [_ratio_cell(r[metric][key], True) for r in ratios.values()]
            table.add_row(f"{title} {statistic}", *cells, end_section=key == "p99")
    for metric, title in RATES.items():
        table.add_row(title, *(_ratio_cell(r[metric], False) for r in ratios.values()))
    return table


def measured_text(report: dict[str, Any]) -> str:
    """What part of each run was measured."""
    window = window_of(report)
    if window is None:
        return "measured: whole runs, their beginning and end too"
    requests = sum(arm["requests"] for arm in report["arms"].values())
    repeats = sum(arm["repeats"] for arm in report["arms"].values())
    return (
        f"measured: {requests / repeats:,.0f} requests in {window.seconds:,.3g} s of every run, "
        f"after {window.begin_s:,.3g} s of arrivals that go on to the last one's end"
    )


def _footer(report: dict[str, Any]) -> list[str]:
    lines = []
    if report.get("rate_rps"):
        load = f" (load {report['load']:g}" if report.get("load") else ""
        if load:
            capacity = report.get("capacity_rps")
            load += f" of {capacity:.2f})" if capacity else ")"
        lines.append(f"arrivals: {report['rate_rps']:.2f} requests/s{load}")
    if "window" in report:
        lines.append(measured_text(report))
    slo = ", ".join(f"{k} <= {v:g}" for k, v in report["slo"].items())
    lines.append(f"goodput: at {slo}" if slo else "goodput: no SLO stated, so it is throughput")
    client = report.get("client")  # a simulated run has none
    if client is not None:
        lines.append(_client_line(client))
    return lines


def _client_line(client: dict[str, Any]) -> str:
    return (
        f"client: {client['core_share']:.1%} of one core, {client['cpu_us_per_token']:.0f} us of "
        f"CPU per token, {client['peak_streams']} streams at most, "
        f"{client['send_lag_p99_ms']:.1f} ms late at sending (P99), "
        f"without a core {client['cpu_wait_share']:.1%} of the time"
    )


def warnings(report: dict[str, Any]) -> list[str]:
    """What a reader must know before believing the figures."""
    found = []
    client = report.get("client")
    if client and client["send_lag_p99_ms"] > MAX_SEND_LAG_MS:
        lag = client["send_lag_p99_ms"]
        found.append(f"requests left up to {lag:.0f} ms late (P99): arrivals were not the trace's")
    if client and client["cpu_wait_share"] > MAX_CPU_WAIT_SHARE:
        share = client["cpu_wait_share"]
        found.append(
            f"the client had no core {share:.0%} of the time: latencies are partly its own"
        )
    for name, arm in report["arms"].items():
        lost = arm["rejected"] + arm["failed"] + arm["aborted"]
        if lost:
            found.append(f"{name}: {lost} of {arm['requests']} requests are not in its latencies")
    return [*unsteady(report), *found]


def unsteady(report: dict[str, Any]) -> list[str]:
    """Which arms' figures are not those of a steady state, and why."""
    window = window_of(report)
    if window is None:
        return []
    backlogs = {name: arm.get("backlog") for name, arm in report["arms"].items()}
    return [f"{n}: {text}" for n, b in backlogs.items() if b for text in _why_unsteady(b, window)]


def _why_unsteady(backlog: dict[str, Any], window: Window) -> list[str]:
    if not backlog["bounded"]:
        return [
            f"not in steady state: {backlog['growth']:.0%} of what arrives piles up, and the "
            "longer it is measured the longer its latencies are"
        ]
    if backlog["falls"]:
        return [
            f"not in steady state: {-backlog['growth']:.0%} more ends than arrives: what came "
            "before is still being worked off (--settle)"
        ]
    stays_s = backlog["residence_p99_s"]
    if stays_s is None or stays_s > LONG_STAY * window.begin_s:
        stay = "never end" if stays_s is None else f"stay {stays_s:,.3g} s"
        return [
            f"perhaps not in steady state: requests {stay} (P99), arrivals before what is measured "
            f"took {window.begin_s:,.3g} s (--settle)"
        ]
    return []


def _parts(columns: dict[str, Any], width: int, cell: int) -> Iterator[dict[str, Any]]:
    """`columns` in groups that fit into `width` when each takes `cell`, or its name's length."""
    part: dict[str, Any] = {}
    taken = 0
    for name, column in columns.items():
        needed = max(cell, len(name) + 3)
        if part and taken + needed > width:
            yield part
            part, taken = {}, 0
        part[name] = column
        taken += needed
    if part:
        yield part


def print_report(report: dict[str, Any], console: Console) -> None:
    """Prints the whole report; tables are split where the console is too narrow."""
    for part in _parts(report["arms"], console.width - LABEL, ARM_CELL):
        console.print(_arms_table(part))
    for part in _parts(report["ratios"], console.width - LABEL, RATIO_CELL):
        console.print(_ratios_table(part))
    lines = [ratios_title(report)] if report["ratios"] else []
    for line in [*lines, *_footer(report)]:
        console.print(line, highlight=False, soft_wrap=True)
    for line in warnings(report):
        console.print(f"warning: {line}", style="yellow", highlight=False, soft_wrap=True)
