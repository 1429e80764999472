"""The report of `gimbal.sim.goodput`, as a table and a chart."""

from __future__ import annotations

from typing import Any

import numpy as np
from rich.table import Table

from gimbal.report.charts import Lines

TICKS = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)


def goodput_table(report: dict[str, Any]) -> Table:
    """A row per arm: the highest rates, and their ratios to the base arm's."""
    limits = ", ".join(f"{name} <= {value:g}" for name, value in report["slo"].items())
    table = Table(
        title=f"Highest rate (requests/s) with so many requests at {limits}", title_justify="left"
    )
    table.add_column("", no_wrap=True)
    shares = list(next(iter(report["arms"].values()))["rate_rps"])
    for share in shares:
        table.add_column(share, justify="right")
        table.add_column(f"over {report['base']}", justify="right")
    for name, arm in report["arms"].items():
        cells = []
        for share in shares:
            beyond = f"> {report['rates_rps'][-1]:.3g}"
            cells += [_cell(arm["rate_rps"][share], beyond), _cell(arm["ratio"][share], "-")]
        table.add_row(name, *cells)
    return table


def goodput_chart(report: dict[str, Any]) -> Lines:
    """Share of the requests that keep the limits, over the rate of arrivals."""
    rates = np.array(report["rates_rps"])
    arms = report["arms"]
    series = {name: (rates, np.array(arm["attained"])) for name, arm in arms.items()}
    title = f"Requests within their limits, {report['trace']} on {report['cluster']}"
    return Lines(title, "requests/s", "share", series, list(arms), y_ticks=TICKS, percent_y=True)


def _cell(values: dict[str, float | None], unknown: str) -> str:
    value, low, high = values["value"], values["low"], values["high"]
    if value is None:
        return unknown
    interval = "" if low is None or high is None else f" [{low:.3g}, {high:.3g}]"
    return f"{value:.3g}{interval}"
