"""``gimbal reproduce``: the paper's evaluation again, on the simulator and on live servers."""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import click

from gimbal.commands.options import OutFolder, Whole
from gimbal.commands.output import notes, progress_bar
from gimbal.core.files import write_text, writing
from gimbal.core.json_text import to_json
from gimbal.core.numbers import MOST_REQUESTS
from reproduction.command_goodput import goodput
from reproduction.command_live import live, resumable
from reproduction.command_regimes import regimes


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def command() -> None:
    """Repeat an evaluation."""


command.add_command(goodput)
command.add_command(live)
command.add_command(regimes)


@command.command()
@click.option("--quick", is_flag=True, help="fewer loads, seeds and requests: minutes, not hours")
@click.option(
    "--out",
    type=OutFolder(),
    default=Path("runs/reproduction"),
    show_default=True,
    help="directory of finished cells and the report; a stopped run continues from it",
)
@click.option("--jobs", type=Whole(1, 1024), help="processes (default: all CPUs)")
@click.option("--seeds", type=Whole(1, 10_000), help="seeds per cell (default: 8; quick: 4)")
@click.option("--requests", type=Whole(10, MOST_REQUESTS), help="requests per cell")
@click.option("--scenarios", help="comma-separated; default: all (see reproduction/README.md)")
@click.option("--json", "as_json", is_flag=True, help="print the result as one JSON object")
def paper(**values: Any) -> None:
    """The Gimbal paper's comparison: DP=2, TP=2, EP=4, Qwen3-30B-A3B on four H100.

    Five length distributions over BurstGPT, loads from 0.3 to 1.2 of the simulated capacity, eight
    arms (ten in scenario `routed`), under named conditions. Every finished cell is a file:
    interrupted and started again, it continues. Writes report.md, result.json and, for
    `gimbal report`, one run per scenario.

    Example: gimbal reproduce paper --quick --out runs/paper
    """
    from gimbal.records.environment import describe_environment
    from reproduction import matrix as reproduce
    from reproduction import paper as tables
    from reproduction.paper_markdown import render

    matrix = _matrix(values)
    out: Path = values["out"]
    jobs = values["jobs"] or len(os.sched_getaffinity(0))
    with writing(f"--out {out}"):
        out.mkdir(parents=True, exist_ok=True)
    with progress_bar(notes(), "simulating") as bar, resumable(out):
        results = list(reproduce.run_matrix(matrix, out, jobs, bar.update))
    result = tables.report(results, values["quick"], describe_environment())
    text = render(result)
    write_text(out / "report.md", text)
    write_text(out / "result.json", to_json(result, indent=1))
    _write_runs(out, results)
    if len(result["code"]) > 1:
        click.echo(f"warning: cells come from {len(result['code'])} versions of the code", err=True)
    click.echo(to_json(result) if values["as_json"] else text)


def _matrix(values: dict[str, Any]) -> Any:
    from gimbal.core.errors import InputError, nearest
    from reproduction.matrix import QUICK, Matrix
    from reproduction.scenarios import SCENARIOS

    matrix = QUICK if values["quick"] else Matrix()
    changes = {k: values[k] for k in ("seeds", "requests") if values[k] is not None}
    if values["scenarios"]:
        names = tuple(name.strip() for name in values["scenarios"].split(","))
        for name in names:
            if name not in SCENARIOS:
                raise InputError(f"unknown scenario {name!r}{nearest(name, SCENARIOS)}")
        changes["scenarios"] = names
    return dataclasses.replace(matrix, **changes)


def _write_runs(out: Path, results: list[Any]) -> None:
    """One run directory per scenario from the cells whose requests were kept."""
    from gimbal.records.schema import RunInfo
    from gimbal.records.store import RunWriter
    from gimbal.report.arms import get_arm
    from gimbal.report.metrics import Slo
    from gimbal.report.simulated import report_of
    from reproduction.matrix import FIRST_SEED, KEPT_LOAD, kept_run

    kept = [(task, cell) for task, cell in results if task.arm and task.kept]
    for scenario in dict.fromkeys(task.scenario for task, _ in kept):
        own = [(task, kept_run(cell)) for task, cell in kept if task.scenario == scenario]
        own.sort(key=lambda pair: pair[1].repeat)
        first, runs = own[0][0], [run for _, run in own]
        names = list(dict.fromkeys(run.arm for run in runs))
        report = report_of(runs, names, "vllm", Slo(), FIRST_SEED) | {
            "cluster": scenario,
            "load": KEPT_LOAD,
            "capacity_rps": first.capacity_rps,
            "rate_rps": KEPT_LOAD * first.capacity_rps,
        }
        info = RunInfo(
            kind="simulate",
            command=tuple(sys.argv[1:]),
            seed=FIRST_SEED,
            repeats=len({run.repeat for run in runs}),
            trace={"name": f"{first.trace}-{first.distribution}", "options": {}},
            arms={name: get_arm(name).to_json() for name in names},
            environment=report["environment"],
            result=report,
        )
        directory = out / scenario
        shutil.rmtree(directory, ignore_errors=True)
        with RunWriter(directory, info) as writer:
            for run in runs:
                writer.write(run.records)
                writer.write(run.rebalances)
                writer.write(run.placements)
