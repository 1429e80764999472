"""``gimbal bench``: replay a trace against live servers and compare arms in turns."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from gimbal.commands.arm_options import arm_options, arms_given, list_names, read_arm_options
from gimbal.commands.options import FIGURES, OutFile, OutFolder, Real, Whole
from gimbal.commands.output import echo_json, notes, progress_bar, tables
from gimbal.commands.workload_options import (
    LOAD,
    RATE,
    SECONDS,
    SERVERS,
    check_run_options,
    read_trace_options,
    read_workload_options,
    workload_options,
)
from gimbal.core.numbers import MOST_COUNT, MOST_RANKS

if TYPE_CHECKING:
    from gimbal.bench.run import BenchSetup
    from gimbal.report.arms import Arm
    from gimbal.workloads import WorkloadOptions


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@workload_options
@click.option("--demo", is_flag=True, help="start `gimbal serve --demo` servers and stop them")
@click.option("--url", help="measure the server there instead of starting any")
@arm_options
@click.option(
    "--duration",
    type=SECONDS,
    default=60.0,
    show_default=True,
    help="seconds of measured arrivals per turn when --requests is not given",
)
@click.option(
    "--settle",
    type=Real(most=1e7),
    help="seconds of arrivals before and after those (default: as long as 99 % of the requests "
    "stayed at the capacity that --load measures, otherwise 0); 0 measures whole turns",
)
@click.option("--load", type=LOAD, help="rate as a fraction of the capacity measured first")
@click.option("--capacity", type=RATE, help="requests per second that --load is a fraction of")
@click.option(
    "--warm-up", type=Whole(), default=16, show_default=True, help="requests before each turn"
)
@click.option(
    "--pin-domains",
    type=Whole(0, MOST_RANKS),
    default=0,
    metavar="ENGINES",
    help="send each domain of the demo model to one of so many engines, past dispatch",
)
@click.option("--slo", default="", help="what goodput counts: ttft_ms=2000,tpot_ms=200,e2e_ms=...")
@click.option(
    "--share/--no-share",
    default=True,
    show_default=True,
    help="let arms that can be switched at run time share a server",
)
@click.option(
    "--resident", type=SERVERS, default=1, show_default=True, help="servers alive at once"
)
@click.option(
    "--timeout", type=SECONDS, default=600.0, show_default=True, help="seconds for one request"
)
@click.option("--model-dir", type=click.Path(path_type=Path), help="where token ids come from")
@click.option(
    "--salt",
    type=Whole(-MOST_COUNT),
    help="prompts of another salt share no prefix (default: time)",
)
@click.option("--out", type=OutFolder(), help="run directory (default: runs/...)")
@click.option("--json", "as_json", is_flag=True, help="print one JSON object")
@click.option("--plot-trace", type=OutFile(FIGURES), help="plot the workload and stop")
@click.option("--check-client", is_flag=True, help="measure the client alone and stop")
@click.argument("server_arguments", nargs=-1, type=click.UNPROCESSED)
def command(**values: Any) -> None:
    """Replay a trace against live servers, arms in turns, and report latencies and ratios.

    Servers are started with `gimbal serve SERVER_ARGUMENTS` (a model and vLLM flags, after
    `--`), with the demo model (--demo), or not at all (--url).

    Example: gimbal bench --demo --trace burstgpt --load 0.9 --repeat 5 --out runs/mine
    """
    if values["list_names"]:
        list_names(values)
        return
    console = notes()
    if values.pop("check_client"):
        _check_client(values["as_json"])
        return
    workload = read_workload_options(values)
    check_run_options(values, workload)
    if values["plot_trace"] is not None:
        _plot(values, workload, console)
        return
    from gimbal.bench.run import run_bench
    from gimbal.records.store import require_no_run
    from gimbal.report.table import print_report

    setup = _setup(values, workload)
    require_no_run(setup.directory)

    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    for note in setup.options.trace.notes:
        say(note)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with progress_bar(console, "starting") as bar:
            report, interrupted = run_bench(setup, say, bar)
    except RuntimeError as error:
        raise click.ClickException(str(error)) from error
    if values["as_json"]:
        echo_json(report)
    else:
        print_report(report, tables())
    if interrupted:
        raise KeyboardInterrupt(f"what has been measured is in {setup.directory}")


def _check_client(as_json: bool) -> None:
    from gimbal.bench.client_process import check_client

    with progress_bar(notes(), "streaming from an echo server") as bar:
        usage = check_client(on_progress=bar.requests).usage
    figures = {
        "streams": usage.peak_streams,
        "tokens": usage.events,
        "cpu_us_per_token": usage.cpu_us_per_token,
        "core_share": usage.core_share,
        "tokens_per_s": usage.events / usage.wall_s,
        "send_lag_p99_ms": usage.send_lag_p99_ms,
    }
    if as_json:
        echo_json(figures)
        return
    click.echo(
        f"client: {usage.peak_streams} streams, {usage.events} tokens: "
        f"{usage.cpu_us_per_token:.1f} us of CPU per token, {usage.core_share:.0%} of one core"
    )


def _plot(values: dict[str, Any], workload: WorkloadOptions, console: Console) -> None:
    from gimbal.workloads.plot import plot_workload

    path, trace = values["plot_trace"], read_trace_options(values)
    plot_workload(trace, workload, values["seed"], path)
    console.print("\n".join((*trace.notes, f"wrote {path}")), highlight=False, soft_wrap=True)
    if values["as_json"]:
        echo_json({"plot": str(path), "notes": trace.notes})


def _setup(values: dict[str, Any], workload: WorkloadOptions) -> BenchSetup:
    """What is measured, everything that can be refused refused before a server starts."""
    from gimbal.bench.run import BenchSetup, check_vocabulary, endpoint_of, vocabulary_of
    from gimbal.bench.session import BenchOptions
    from gimbal.report.metrics import parse_slo
    from gimbal.workloads import build_workload

    _check(values)
    if not values["url"]:
        check_vocabulary(_server_arguments(values), values["model_dir"])
    trace = read_trace_options(values)
    build_workload(trace, workload, values["seed"])
    as_it_is = bool(values["url"]) and not arms_given(values)
    arms = _arms(values, as_it_is)
    if values["url"]:
        server = endpoint_of(values["url"])
        server.model()  # who does not answer is refused before anything is written
        vocabulary_of(values["model_dir"])(server)
    share = bool(values["url"]) or (values["share"] and len(arms) > 1)
    options = BenchOptions(
        trace=trace,
        workload=workload,
        repeats=values["repeat"],
        seed=values["seed"],
        salt=int(time.time()) if values["salt"] is None else values["salt"],
        duration_s=values["duration"],
        settle_s=values["settle"],
        load=values["load"],
        capacity_rps=values["capacity"],
        warm_up=values["warm_up"],
        slo=parse_slo(values["slo"]),
        share=share,
        timeout_s=values["timeout"],
        pin_engines=values["pin_domains"],
    )
    return BenchSetup(
        options,
        arms,
        directory=values["out"] or Path("runs") / time.strftime("bench-%Y%m%d-%H%M%S"),
        url=values["url"],
        server_arguments=_server_arguments(values),
        resident=values["resident"],
        switch=share and not as_it_is,
        model_dir=values["model_dir"],
        command=tuple(sys.argv[1:]),
    )


def _server_arguments(values: dict[str, Any]) -> tuple[str, ...]:
    return (*(("--demo",) if values["demo"] else ()), *values["server_arguments"])


def _check(values: dict[str, Any]) -> None:
    """Raises InputError for options that say nothing, or contradict each other."""
    from gimbal.core.errors import InputError

    started = bool(values["server_arguments"]) and not values["demo"]
    if sum([bool(values["demo"]), bool(values["url"]), started]) != 1:
        raise InputError("give one of --demo, --url URL, or a model: gimbal bench [..] -- MODEL")


def _arms(values: dict[str, Any], as_it_is: bool) -> list[Arm]:
    """The arms; of a server that is there already (`as_it_is`) a single one, what it does now."""
    from gimbal.bench.arms import needs_own_server, refuse_simulated
    from gimbal.core.errors import InputError
    from gimbal.report.arms import Arm

    if as_it_is:
        return [Arm("server", "the server as it is")]
    arms = read_arm_options(values)
    refuse_simulated(arms)
    for arm in arms:
        if values["url"] and needs_own_server(arm):
            raise InputError(
                f"--url: arm {arm.name!r} has flags or configuration that need a server of its own"
            )
    return arms
