"""``gimbal reproduce live``: the ablation on live servers, smaller than the simulated matrix."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from gimbal.commands.options import OutFolder, parse_loads
from gimbal.commands.output import echo_json, notes, progress_bar, tables
from gimbal.commands.workload_options import (
    MAX_OUTPUT,
    MAX_PROMPT,
    RATE,
    SECONDS,
    SEED,
    SERVERS,
    TURNS,
)
from gimbal.core.files import writing


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--loads", default="0.9", show_default=True, help="shares of the capacity of vllm")
@click.option("--arms", "arm_names", help="comma-separated (default: the paper's ablation)")
@click.option(
    "--repeat", type=TURNS, default=1, show_default=True, help="turns of every arm and load"
)
@click.option(
    "--duration", type=SECONDS, default=60.0, show_default=True, help="seconds of arrivals per turn"
)
@click.option("--capacity", type=RATE, help="requests per second; measured first if not given")
@click.option(
    "--resident",
    type=SERVERS,
    default=1,
    show_default=True,
    help="servers alive at once; with one per group of arms (4 of the default arms, some 4 GB each "
    "for the demo) all arms take turns, otherwise those of one server",
)
@MAX_PROMPT
@MAX_OUTPUT
@click.option("--seed", type=SEED, default=2000, show_default=True, help="of every random choice")
@click.option(
    "--out",
    type=OutFolder(),
    default=Path("runs/reproduction-live"),
    show_default=True,
    help="one run directory per load; a stopped run continues from it",
)
@click.option("--json", "as_json", is_flag=True, help="print the results as one JSON object")
@click.argument("server_arguments", nargs=-1, type=click.UNPROCESSED)
def live(**values: Any) -> None:
    """The paper's ablation on live servers: vllm-legacy, vllm, and Gimbal level by level.

    On the demo model (DP=2, EP=2, CPU) unless a model and vLLM flags follow after `--`.
    BurstGPT's lengths, gamma arrivals. A turn ends with its longest request: cut outputs make turns
    of a few seconds comparable. Finished turns are kept: interrupted and started again, it
    continues. Each load is a run for `gimbal report OUT/live-LOAD`.

    Example: gimbal reproduce live --loads 0.7,0.9 --max-output 64 --duration 20
    """
    from gimbal.bench.run import check_vocabulary
    from gimbal.bench.servers import ServerPool
    from gimbal.records.store import RunReader
    from gimbal.report.table import print_report
    from gimbal.workloads.prompts import read_vocabulary

    matrix, info = _matrix(values)
    arguments = values["server_arguments"] or ("--demo",)
    check_vocabulary(arguments)
    out: Path = values["out"]
    with writing(f"--out {out}"):
        out.mkdir(parents=True, exist_ok=True)
    console = notes()

    def say(text: str) -> None:
        console.print(text, highlight=False)

    vocabularies: dict[str, Any] = {}

    def vocabulary(endpoint: Any) -> Any:
        root = endpoint.model().root
        return vocabularies.setdefault(root, read_vocabulary(Path(root)))

    from reproduction.live import LiveRun

    pool = ServerPool(arguments, out, values["resident"], say)
    try:
        with progress_bar(console, "starting") as bar, resumable(out):
            paths = LiveRun(matrix, out, pool, vocabulary, info, say, bar).run()
    except RuntimeError as error:
        raise click.ClickException(str(error)) from error
    results = {path.name: RunReader(path).info().result for path in paths}
    if values["as_json"]:
        echo_json(results)
        return
    for result in filter(None, results.values()):
        print_report(result, tables())


@contextmanager
def resumable(out: Path) -> Iterator[None]:
    """Has a command that is interrupted, or terminated, say how to go on."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"the same command continues from {out}") from None


def _matrix(values: dict[str, Any]) -> tuple[Any, Any]:
    """What is measured, and what each run says of itself; raises InputError."""
    from dataclasses import asdict

    from gimbal.bench.arms import refuse_simulated
    from gimbal.bench.session import BenchOptions
    from gimbal.records.environment import describe_environment
    from gimbal.records.schema import RunInfo
    from gimbal.report.arms_file import select_arms
    from gimbal.workloads import WorkloadOptions, load_trace
    from reproduction.live import ARMS, LiveMatrix

    loads = parse_loads(values["loads"])
    names = (
        tuple(n.strip() for n in values["arm_names"].split(",")) if values["arm_names"] else ARMS
    )
    refuse_simulated(select_arms(names))
    trace = load_trace("burstgpt")
    workload = WorkloadOptions(
        arrivals="gamma",
        cv=2.0,
        max_prompt=values["max_prompt"],
        max_output=values["max_output"],
    )
    options = BenchOptions(
        trace=trace,
        workload=workload,
        repeats=values["repeat"],
        seed=values["seed"],
        salt=int(time.time()),
        duration_s=values["duration"],
        capacity_rps=values["capacity"],
    )
    info = RunInfo(
        kind="bench",
        command=tuple(sys.argv[1:]),
        seed=options.seed,
        repeats=options.repeats,
        trace={"name": trace.name, "requests": len(trace), "options": asdict(workload)},
        arms={},
        environment=describe_environment(),
    )
    return LiveMatrix(options, loads, names), info
