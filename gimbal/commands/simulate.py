"""``gimbal simulate``: what the arms would do on a cluster and a trace, without the cluster."""

from __future__ import annotations

import sys
from typing import Any

import click

from gimbal.commands.arm_options import arm_options, list_names
from gimbal.commands.cluster_options import cluster_options, comparison_options
from gimbal.commands.options import OutFolder, Real, Whole
from gimbal.commands.output import echo_json, notes, progress_bar, tables
from gimbal.commands.workload_options import (
    LOAD,
    check_run_options,
    read_workload_options,
    workload_options,
)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@workload_options
@cluster_options
@arm_options
@click.option("--load", type=LOAD, help="rate as a fraction of the simulated capacity")
@click.option(
    "--settle",
    type=Real(),
    help="seconds of arrivals before what is measured (default: as long as 99 % of the requests "
    "stay); 0 measures every request, the beginning and the end of the run too",
)
@click.option("--slo", default="", help="what goodput counts: ttft_ms=2000,tpot_ms=200,...")
@click.option("--jobs", type=Whole(1, 1024), help="processes (default: all CPUs)")
@click.option("--out", type=OutFolder(), help="keep the records in this directory")
@click.option("--json", "as_json", is_flag=True, help="print one JSON object")
def command(**values: Any) -> None:
    """Simulate requests on a cluster under several arms: the report of `gimbal bench`, offline.

    The policies are the ones that run in the server, and an arm is the one that `gimbal bench`
    runs; of its vLLM flags the simulator understands a few. With the same seed the output is the
    same, byte for byte.

    Example: gimbal simulate --cluster h100x4-paper --load 0.9 --repeat 5 --slo ttft_ms=2000
    """
    if values["list_names"]:
        from gimbal.core.model import model_names
        from gimbal.sim.cluster import cluster_names

        list_names(values, clusters=cluster_names(), models=model_names())
        return
    from gimbal.records.store import require_no_run
    from gimbal.report.table import print_report
    from gimbal.sim.comparison import keep_run, run_comparison

    workload = read_workload_options(values)
    check_run_options(values, workload)
    options = comparison_options(values, workload)
    if values["out"] is not None:
        require_no_run(values["out"])  # what cannot be kept is not simulated
    console = notes()
    with progress_bar(console, "simulating") as bar:
        report, results = run_comparison(options, values["jobs"], bar.update, bar.say)
    for note in report["notes"]:
        console.print(note, highlight=False, soft_wrap=True)
    if values["out"] is not None:
        keep_run(values["out"], options, report, results, sys.argv[1:])
    if values["as_json"]:
        echo_json(report)
        return
    print_report(report, tables())
