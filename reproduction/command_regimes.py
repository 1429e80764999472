"""``gimbal reproduce regimes``: where users lose most, against vLLM and the best peer."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from gimbal.commands.options import OutFile, OutFolder, Whole, parse_loads
from gimbal.commands.output import echo_json, notes, progress_bar
from gimbal.commands.workload_options import TURNS
from gimbal.core.files import write_text, writing
from gimbal.core.json_text import to_json
from gimbal.core.numbers import MOST_REQUESTS
from reproduction.command_live import resumable


def regime_options(loads: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """What is run, and where its cells are kept.

    Args:
        loads: default of ``--loads``.
    """
    options = (
        click.option(
            "--regimes",
            "names",
            help="comma-separated (default: all whose traces are here; see README)",
        ),
        click.option(
            "--loads", default=loads, show_default=True, help="shares of the regime's capacity"
        ),
        click.option("--seeds", type=TURNS, default=5, show_default=True, help="runs of every arm"),
        click.option(
            "--first-seed",
            type=Whole(),
            default=11,
            show_default=True,
            help="of the first run; the next has the next one",
        ),
        click.option(
            "--requests",
            type=Whole(10, MOST_REQUESTS),
            help="measured ones of a run (default: 1,500 where answers or contexts are long, "
            "else as many as the trace has, and for twice as long as 99 % of them stay)",
        ),
        click.option("--kept", is_flag=True, help="run nothing: take what is finished in --out"),
        click.option("--jobs", type=Whole(1, 1024), help="processes (default: all CPUs)"),
        click.option(
            "--out",
            type=OutFolder(),
            default=Path("runs/regimes"),
            show_default=True,
            help="directory of finished cells and the tables; a stopped run continues from it",
        ),
    )

    def added(function: Callable[..., None]) -> Callable[..., None]:
        for option in reversed(options):
            function = option(function)
        return function

    return added


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@regime_options("0.7,0.9")
@click.option(
    "--plot", type=OutFile((".svg", ".png")), help="draw mean latencies over load, per regime"
)
@click.option("--json", "as_json", is_flag=True, help="print the result as one JSON object")
def regimes(**values: Any) -> None:
    """Conversations, agents, long answers with scarce KV memory, bursts: simulated, steady state.

    Arms vllm, gimbal-dp, the peers lmetric, llm-d and dynamo, and ideal-pool. Writes regimes.md and
    regimes.json: ratios to vllm and to the best peer of each cell with intervals over seeds, shares
    of what can be won, losses first. Every finished cell is a file: interrupted and started again,
    it continues.

    Example: gimbal reproduce regimes --loads 0.9 --seeds 2
    """
    from gimbal.core.errors import InputError
    from gimbal.records.environment import describe_environment
    from reproduction.regimes import run_regimes
    from reproduction.regimes_report import group_report, render, whole_report

    console = notes()
    plan = plan_of(values, lambda text: console.print(text, highlight=False, soft_wrap=True))
    out: Path = values["out"]
    jobs = values["jobs"] or len(os.sched_getaffinity(0))
    with writing(f"--out {out}"):
        out.mkdir(parents=True, exist_ok=True)
    with progress_bar(console, "simulating") as bar, resumable(out):
        groups = run_regimes(plan, out, jobs, bar.update, bar.say, not values["kept"])
        # Each is reported as it ends: all runs together may not fit into memory.
        found = [(group.code, group_report(group, plan)) for group in groups]
    if not found:
        raise InputError(f"--kept: no load in {values['loads']} is finished in {out}")
    report = whole_report(found, plan, describe_environment())
    text = render(report)
    write_text(out / "regimes.md", text)
    write_text(out / "regimes.json", to_json(report, indent=1))
    if values["plot"] is not None:
        from reproduction.plots import plot_regimes

        plot_regimes(report["groups"], values["plot"])
    if len(report["code"]) > 1:
        click.echo(f"warning: cells come from {len(report['code'])} versions of the code", err=True)
    if values["as_json"]:
        echo_json(report)
        return
    click.echo(text)


def plan_of(values: dict[str, Any], say: Any) -> Any:
    """What is run; raises InputError for a regime that is not known, or asked for without trace."""
    from gimbal.core.errors import InputError, nearest
    from gimbal.workloads import load_trace
    from reproduction.regimes import REGIMES, Plan, available

    names = list(REGIMES) if values["names"] is None else values["names"].split(",")
    chosen = []
    for name in dict.fromkeys(part.strip() for part in names):
        if name not in REGIMES:
            raise InputError(f"--regimes: unknown regime {name!r}{nearest(name, REGIMES)}")
        chosen.append(REGIMES[name])
    plan = Plan(
        tuple(chosen),
        tuple(dict.fromkeys(parse_loads(values["loads"]))),
        values["seeds"],
        values["first_seed"],
        values["requests"],
    )
    if values["names"] is None:
        return available(plan, say)
    for regime in chosen:
        load_trace(regime.trace)
    return plan
