"""``gimbal simulate``: what the arms would do on a cluster and a trace, without the cluster."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from gimbal.commands.arm_options import arm_options, list_arms, read_arm_options
from gimbal.commands.workload_options import (
    check_run_options,
    read_workload_options,
    workload_options,
)

if TYPE_CHECKING:
    from gimbal.sim.comparison import ComparisonOptions


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@workload_options
@click.option(
    "--cluster",
    default="h100x4-paper",
    show_default=True,
    help="named cluster, or a YAML file",
)
@arm_options
@click.option("--load", type=float, help="rate as a fraction of the simulated capacity")
@click.option("--slo", default="", help="what goodput counts: ttft_ms=2000,tpot_ms=200,...")
@click.option("--jobs", type=int, help="processes (default: all CPUs)")
@click.option("--out", type=click.Path(path_type=Path), help="keep the records in this directory")
@click.option("--json", "as_json", is_flag=True, help="print one JSON object")
def command(**values: Any) -> None:
    """Simulate a trace on a cluster under several arms: the report of `gimbal bench`, offline.

    The policies are the ones that run in the server, and an arm is the one that `gimbal bench`
    runs; of its vLLM flags the simulator understands a few. With the same seed the output is the
    same, byte for byte.
    """
    if values["list_names"]:
        from gimbal.sim.cluster import cluster_names

        click.echo("clusters: " + ", ".join(cluster_names()))
        list_arms(values)
        return
    from gimbal.report.table import print_report
    from gimbal.sim.comparison import keep_run, run_comparison

    options = _options(values)
    console = Console(stderr=True)
    columns = (TextColumn("simulating"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        report, results = run_comparison(
            options, values["jobs"], lambda n, total: bar.update(task, completed=n, total=total)
        )
    if values["out"] is not None:
        keep_run(values["out"], options, report, results, sys.argv[1:])
    if values["as_json"]:
        click.echo(json.dumps(report))
        return
    out = Console()
    print_report(report, out if out.is_terminal else Console(width=160))


def _options(values: dict[str, Any]) -> ComparisonOptions:
    from gimbal.core.errors import InputError
    from gimbal.report.metrics import parse_slo
    from gimbal.sim.comparison import ComparisonOptions
    from gimbal.workloads import load_trace

    workload = read_workload_options(values)
    check_run_options(values, workload)
    if values["jobs"] is not None and values["jobs"] < 1:
        raise InputError(f"--jobs {values['jobs']}: expected a whole number >= 1")
    return ComparisonOptions(
        cluster=values["cluster"],
        trace=load_trace(values["trace_name"]),
        workload=workload,
        arms=tuple(read_arm_options(values)),
        repeats=values["repeat"],
        seed=values["seed"],
        load=values["load"],
        slo=parse_slo(values["slo"]),
    )
