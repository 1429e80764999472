"""``gimbal goodput``: the highest rate at which requests keep their targets, per arm."""

from __future__ import annotations

import os
from typing import Any

import click

from gimbal.commands.arm_options import arm_options, list_names
from gimbal.commands.cluster_options import cluster_options, comparison_options
from gimbal.commands.options import OutFile, Real, Whole, parse_loads
from gimbal.commands.output import echo_json, notes, progress_bar, tables
from gimbal.commands.workload_options import (
    read_workload_options,
    workload_options,
)
from gimbal.core.errors import InputError


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@workload_options
@cluster_options
@arm_options
@click.option("--slo", default="", help="limits of a good request: ttft_ms=2000,tpot_ms=50,...")
@click.option(
    "--loads",
    default="0.3,0.5,0.6,0.7,0.8,0.9,1,1.1,1.25",
    show_default=True,
    help="rates that are run, as ascending shares of the simulated capacity",
)
@click.option("--settle", type=Real(), help="as of `gimbal simulate`")
@click.option("--jobs", type=Whole(1, 1024), help="processes (default: all CPUs)")
@click.option("--plot", type=OutFile((".svg",)), help="draw the share of good requests over rates")
@click.option("--json", "as_json", is_flag=True, help="print one JSON object")
def command(**values: Any) -> None:
    """Find the highest rate at which 99 % and 90 % of requests keep --slo, simulated, per arm.

    The arms run the same requests at several rates; with --repeat 5 or more the rates, and their
    ratios to the base arm's, have 95 % intervals over repeats.

    Example: gimbal goodput --cluster h100x4-paper --slo ttft_ms=2000,tpot_ms=50 --repeat 5
    """
    if values["list_names"]:
        list_names(values)
        return
    from gimbal.core.files import write_text
    from gimbal.report.goodput import goodput_chart, goodput_table
    from gimbal.report.metrics import parse_slo
    from gimbal.report.svg import standalone
    from gimbal.sim.goodput import goodput

    workload = read_workload_options(values)
    if workload.rate_rps is not None:
        raise InputError("--rate: rates are shares of the capacity, see --loads")
    if not parse_slo(values["slo"]).limits():
        raise InputError("--slo: say what a good request is, such as ttft_ms=1000,tpot_ms=50")
    options = comparison_options(values, workload)
    loads, jobs = _loads(values["loads"]), values["jobs"] or len(os.sched_getaffinity(0))
    with progress_bar(notes(), "simulating") as bar:
        report = goodput(options, loads, jobs, bar.update, bar.say)
    if values["plot"] is not None:
        write_text(values["plot"], standalone(goodput_chart(report)))
    if values["as_json"]:
        echo_json(report)
        return
    tables().print(goodput_table(report))


def _loads(text: str) -> list[float]:
    loads = list(parse_loads(text))
    if loads != sorted(set(loads)):
        raise InputError(f"--loads {text}: expected ascending numbers")
    return loads
