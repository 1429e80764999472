"""``gimbal reproduce goodput``: the highest rate at which requests keep their regime's limits."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import click

from gimbal.commands.options import OutFile
from gimbal.commands.output import echo_json, notes, progress_bar
from gimbal.core.files import write_text, writing
from gimbal.core.json_text import to_json
from reproduction.command_live import resumable
from reproduction.command_regimes import plan_of, regime_options


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@regime_options("0.1,0.3,0.5,0.7,0.9,1.1,1.3")
@click.option("--slo", default="", help="limits instead of each regime's own: ttft_ms=2000,...")
@click.option("--plot", type=OutFile((".svg", ".png")), help="draw the share within limits")
@click.option("--json", "as_json", is_flag=True, help="print the result as one JSON object")
def goodput(**values: Any) -> None:
    """The highest rate at which 99 % and 90 % of requests keep their limits, per regime and arm.

    Arms vllm, gimbal-dp and the peers lmetric, llm-d and dynamo. Each runs at as few of --loads as
    tell where the shares are crossed. Cells are those of `gimbal reproduce regimes` and stay in
    --out: another run, or other limits, goes on from them. Writes goodput.md and goodput.json.

    Example: gimbal reproduce goodput --regimes mooncake
    """
    from gimbal.core.errors import InputError
    from gimbal.records.environment import describe_environment
    from gimbal.report.metrics import parse_slo
    from reproduction.goodput import run_goodput
    from reproduction.goodput_report import render

    console = notes()
    say = partial(console.print, highlight=False, soft_wrap=True)
    plan = plan_of(values, say)
    if list(plan.loads) != sorted(plan.loads):
        raise InputError(f"--loads {values['loads']}: expected ascending numbers")
    slo = parse_slo(values["slo"])
    limits = limits_of(plan, slo, values["names"] is not None, say)
    out: Path = values["out"]
    jobs = values["jobs"] or len(os.sched_getaffinity(0))
    with writing(f"--out {out}"):
        out.mkdir(parents=True, exist_ok=True)
    with progress_bar(console, "simulating") as bar, resumable(out):
        found = [
            run_goodput(
                regime,
                plan,
                limits[regime.name],
                out,
                jobs,
                not values["kept"],
                bar.say,
            )
            for regime in plan.regimes
            if regime.name in limits
        ]
    report = {
        "seeds": [plan.first_seed + i for i in range(plan.seeds)],
        "environment": describe_environment(),
        "regimes": found,
    }
    text = render(report)
    write_text(out / "goodput.md", text)
    write_text(out / "goodput.json", to_json(report, indent=1))
    if values["plot"] is not None:
        from reproduction.plots import plot_goodput

        plot_goodput(found, values["plot"])
    if values["as_json"]:
        echo_json(report)
        return
    click.echo(text)


def limits_of(plan: Any, slo: Any, named: bool, say: Any) -> dict[str, Any]:
    """Every regime's limits, by name; `say` is told of one that is left out for it has none.

    Raises InputError for such a one that was `named`.
    """
    from gimbal.core.errors import InputError
    from reproduction.goodput import TARGETS

    limits = {}
    for name in (regime.name for regime in plan.regimes):
        if slo.limits() or name in TARGETS:
            limits[name] = slo if slo.limits() else TARGETS[name].slo
        elif named:
            raise InputError(f"--regimes {name}: it has no limits of its own, give --slo")
        else:
            say(f"{name}: left out: it has no limits of its own")
    return limits
