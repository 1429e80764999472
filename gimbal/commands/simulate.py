"""``gimbal simulate``: what the arms would do on a cluster and a trace, without the cluster."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from gimbal.commands.arm_options import arm_options, list_arms, read_arm_options
from gimbal.commands.workload_options import read_workload_options, workload_options


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

    The policies are the ones that run in the server. With the same seed the output is the same,
    byte for byte.
    """
    if values["list_names"]:
        from gimbal.sim.cluster import cluster_names

        click.echo("clusters: " + ", ".join(cluster_names()))
        list_arms(values)
        return
    report = _simulate(values)
    if values["as_json"]:
        click.echo(json.dumps(report))
        return
    from gimbal.report.table import print_report

    out = Console()
    print_report(report, out if out.is_terminal else Console(width=160))


def _simulate(values: dict[str, Any]) -> dict[str, Any]:
    from gimbal.core.errors import InputError
    from gimbal.report.metrics import parse_slo
    from gimbal.sim.capacity import capacity_rps
    from gimbal.sim.cells import POPULATION_SEED, Cell, run_cells
    from gimbal.sim.cluster import load_cluster
    from gimbal.sim.policies import with_flags
    from gimbal.sim.routing import named_population
    from gimbal.workloads import build_workload, load_trace

    workload = read_workload_options(values)
    seed, repeats, slo = values["seed"], values["repeat"], parse_slo(values["slo"])
    if values["load"] is not None and not values["load"] > 0:
        raise InputError(f"--load {values['load']:g}: expected a number > 0")
    if values["load"] is not None and workload.rate_rps is not None:
        raise InputError("--load and --rate both set the arrival rate: give one")
    if repeats < 1:
        raise InputError(f"--repeat {repeats}: expected a whole number >= 1")
    arms = read_arm_options(values)
    base = next((arm for arm in arms if arm.name == "vllm"), arms[0])
    cluster, profile = load_cluster(values["cluster"])
    for arm in arms:
        with_flags(cluster, arm)
    trace = load_trace(values["trace_name"])
    population = named_population(cluster.routing, profile, POPULATION_SEED)
    capacity = None
    if values["load"] is not None:
        sample = build_workload(trace, workload, seed, population.names)
        capacity = capacity_rps(sample, cluster, profile, population, base, seed)
        workload = dataclasses.replace(workload, rate_rps=values["load"] * capacity)
    cells = [
        Cell(
            values["cluster"],
            build_workload(trace, workload, seed + repeat, population.names),
            arm,
            repeat,
            seed + repeat,
        )
        for repeat in range(repeats)
        for arm in arms
    ]
    console = Console(stderr=True)
    columns = (TextColumn("simulating"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=len(cells))
        results = run_cells(cells, values["jobs"], lambda n: bar.update(task, completed=n))
    report = report_of(results, [a.name for a in arms], base.name, slo, seed)
    report |= {
        "cluster": cluster.name,
        "load": values["load"],
        "capacity_rps": capacity,
        "rate_rps": cells[0].trace.rate_rps,
    }
    if values["out"] is not None:
        _write(values["out"], report, results, trace, arms, workload, slo)
    return report


def report_of(
    results: list[Any], names: list[str], base: str, slo: Any, seed: int
) -> dict[str, Any]:
    """The report of ``--json`` from `CellResult` objects; ratios are to the arm `base`."""
    import numpy as np

    from gimbal.report.compare import compare, nested
    from gimbal.report.metrics import balance, summarize

    by_arm = {name: [r for r in results if r.arm == name] for name in names}
    arms: dict[str, Any] = {}
    for name, runs in by_arm.items():
        itl = [run.itl_ms for run in runs]
        arms[name] = summarize([run.records for run in runs], slo) | {
            # Pooled over repeats of about equal size: the mean of the repeats' statistics.
            "itl_ms": {k: _mean([i[k] for i in itl]) for k in itl[0]},
            "repeats": len(runs),
            "balance": balance(_sum([r.tokens_by_engine for r in runs])),
            "requests_by_engine": balance(_sum([r.requests_by_engine for r in runs])),
            "prefix_hit_rate": None,
            "client_core_share": 0.0,
            "expert_balance": _mean([r.balance for r in runs]),
            "preemptions": sum(r.preemptions for r in runs),
            "steps": sum(r.steps for r in runs),
        }
    ratios: dict[str, Any] = {}
    if len(names) > 1:
        runs_by_arm = {name: [r.records for r in runs] for name, runs in by_arm.items()}
        intervals = compare(runs_by_arm, base, slo, np.random.default_rng([seed, 0xB007]))
        ratios = {f"{name}/{base}": nested(metrics) for name, metrics in intervals.items()}
    return {
        "arms": arms,
        "ratios": ratios,
        "seed": seed,
        "slo": slo.limits(),
        "environment": {"simulated": True},
    }


def _mean(values: list[float | None]) -> float | None:
    present = [v for v in values if v is not None]
    return sum(present) / len(present) if present else None


def _sum(rows: list[dict[int, float]]) -> dict[int, float]:
    return {engine: sum(row[engine] for row in rows) for engine in rows[0]}


def _write(
    directory: Path,
    report: dict[str, Any],
    results: list[Any],
    trace: Any,
    arms: list[Any],
    workload: Any,
    slo: Any,
) -> None:
    from gimbal.records.schema import RunInfo
    from gimbal.records.store import RunWriter

    info = RunInfo(
        kind="simulate",
        command=tuple(sys.argv[1:]),
        seed=report["seed"],
        repeats=max(r.repeat for r in results) + 1,
        trace={"name": trace.name, "options": dataclasses.asdict(workload)},
        arms={arm.name: arm.to_json() for arm in arms},
        environment=report["environment"],
        slo=slo.limits(),
        result=report,
    )
    with RunWriter(directory, info) as writer:
        for result in results:
            writer.write(result.records)
            writer.write(result.rebalances)
            writer.write(result.placements)
