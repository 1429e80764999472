"""``gimbal bench``: replay a trace against live servers and compare arms in turns."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from gimbal.commands.arm_options import arm_options, arms_given, list_arms, read_arm_options
from gimbal.commands.workload_options import read_workload_options, workload_options


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@workload_options
@click.option("--demo", is_flag=True, help="start `gimbal serve --demo` servers and stop them")
@click.option("--url", help="measure the server there instead of starting any")
@arm_options
@click.option(
    "--duration",
    default=60.0,
    show_default=True,
    help="seconds of arrivals per turn when --requests is not given",
)
@click.option("--load", type=float, help="rate as a fraction of the capacity measured first")
@click.option("--capacity", type=float, help="requests per second that --load is a fraction of")
@click.option("--warm-up", default=16, show_default=True, help="requests before each turn")
@click.option(
    "--pin-domains",
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
@click.option("--resident", default=1, show_default=True, help="servers alive at once")
@click.option("--timeout", default=600.0, show_default=True, help="seconds for one request")
@click.option("--model-dir", type=click.Path(path_type=Path), help="where token ids come from")
@click.option("--salt", type=int, help="prompts of another salt share no prefix (default: time)")
@click.option("--out", type=click.Path(path_type=Path), help="run directory (default: runs/...)")
@click.option("--json", "as_json", is_flag=True, help="print one JSON object")
@click.option("--plot-trace", type=click.Path(path_type=Path), help="plot the workload and stop")
@click.option("--check-client", is_flag=True, help="measure the client alone and stop")
@click.argument("server_arguments", nargs=-1, type=click.UNPROCESSED)
def command(**values: Any) -> None:
    """Replay a trace against live servers, arms in turns, and report latencies and ratios.

    Servers are started with `gimbal serve SERVER_ARGUMENTS` (a model and vLLM flags, after
    `--`), with the demo model (--demo), or not at all (--url).
    """
    if values["list_names"]:
        list_arms(values)
        return
    console = Console(stderr=True)
    if values.pop("check_client"):
        _check_client(values["as_json"])
        return
    workload = read_workload_options(values)
    if values["plot_trace"] is not None:
        _plot(values, workload, console)
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        report, interrupted = _Bench(values, workload, console).run()
    except RuntimeError as error:
        raise click.ClickException(str(error)) from error
    if values["as_json"]:
        click.echo(json.dumps(report))
    else:
        from gimbal.report.table import print_report

        out = Console()
        print_report(report, out if out.is_terminal else Console(width=160))
    if interrupted:
        sys.exit(1)


def _check_client(as_json: bool) -> None:
    from gimbal.bench.client_process import check_client

    usage = check_client().usage
    figures = {
        "streams": usage.peak_streams,
        "tokens": usage.events,
        "cpu_us_per_token": usage.cpu_us_per_token,
        "core_share": usage.core_share,
        "tokens_per_s": usage.events / usage.wall_s,
        "send_lag_p99_ms": usage.send_lag_p99_ms,
    }
    if as_json:
        click.echo(json.dumps(figures))
        return
    click.echo(
        f"client: {usage.peak_streams} streams, {usage.events} tokens: "
        f"{usage.cpu_us_per_token:.1f} us of CPU per token, {usage.core_share:.0%} of one core"
    )


def _plot(values: dict[str, Any], workload: Any, console: Console) -> None:
    from gimbal.workloads import build_workload, load_trace
    from gimbal.workloads.distributions import DISTRIBUTIONS
    from gimbal.workloads.plot import plot_traces

    trace = load_trace(values["trace_name"])
    if workload.distribution is None and not trace.has_arrivals:
        shapes = {d: replace(workload, distribution=d) for d in DISTRIBUTIONS}
    else:
        shapes = {workload.distribution or trace.name: workload}
    built = {name: build_workload(trace, w, values["seed"]) for name, w in shapes.items()}
    plot_traces(built, values["plot_trace"])
    console.print(f"wrote {values['plot_trace']}")


@dataclass
class _Bench:
    """Wires the pieces of one benchmark together and shows progress."""

    values: dict[str, Any]
    workload: Any
    console: Console

    def run(self) -> tuple[dict[str, Any], bool]:
        """Returns the report and whether it was interrupted."""
        from gimbal.bench.session import BenchSession
        from gimbal.bench.turns import count_starts, plan_turns
        from gimbal.records.store import RunWriter

        options, arms, switch = self._check()
        share = options.share
        plan = plan_turns(arms, options.repeats, share)
        directory = self.values["out"] or Path("runs") / time.strftime("bench-%Y%m%d-%H%M%S")
        interrupted = False
        with RunWriter(directory, self._info(options, arms)) as writer, self._bar() as bar:
            pool = self._pool(directory)
            vocabularies: dict[str, Any] = {}
            session = BenchSession(
                options,
                arms,
                server_of=self._server_of(pool),
                vocabulary_of=lambda endpoint: self._vocabulary(endpoint, vocabularies),
                writer=writer,
                info=self._info(options, arms),
                switch=switch,
                on_progress=bar.update,
                say=self._say,
            )
            starts = 0 if self.values["url"] else count_starts(plan, self.values["resident"])
            self._say(f"{len(plan)} turns, {starts} server starts; records in {directory}")
            for repeat in range(options.repeats):
                order = " ".join(t.arm.name for t in plan if t.repeat == repeat)
                self._say(f"repeat {repeat + 1}: {order}")
            try:
                first = next((t for t in plan if t.arm.name == session.base), plan[0])
                session.settle_rate(first.spec, first.arm)
                self._say(f"about {self._estimate_s(options, session, plan, starts) / 60:.0f} min")
                for number, turn in enumerate(plan, start=1):
                    bar.start(f"{number}/{len(plan)} {turn.arm.name} #{turn.repeat + 1}")
                    session.run(turn)
            except KeyboardInterrupt:
                interrupted = True
                self._say(f"interrupted: what has been measured is in {directory}")
            finally:
                pool.close()
                _keep_rearrangements(pool.records, arms, share, writer)
            return session.report(), interrupted

    def _check(self) -> tuple[Any, list[Any], bool]:
        """Options and arms, everything that can be refused refused before a server starts."""
        from gimbal.bench.arms import needs_own_server, refuse_simulated
        from gimbal.bench.session import BenchOptions
        from gimbal.core.errors import InputError
        from gimbal.report.arms import Arm
        from gimbal.report.metrics import parse_slo
        from gimbal.workloads import build_workload, load_trace

        v = self.values
        given = [bool(v["demo"]), bool(v["url"]), bool(v["server_arguments"]) and not v["demo"]]
        if sum(given) != 1:
            raise InputError(
                "give one of --demo, --url URL, or a model: gimbal bench [..] -- MODEL"
            )
        for name in ("load", "capacity", "timeout", "duration"):
            if v[name] is not None and not v[name] > 0:
                raise InputError(f"--{name} {v[name]:g}: expected a number > 0")
        if v["pin_domains"] < 0:
            raise InputError(f"--pin-domains {v['pin_domains']}: expected a number of engines")
        for name in ("repeat", "resident"):
            if v[name] < 1:
                raise InputError(f"--{name} {v[name]}: expected a whole number >= 1")
        if v["load"] is not None and self.workload.rate_rps is not None:
            raise InputError("--load and --rate both set the arrival rate: give one")
        trace = load_trace(v["trace_name"])
        build_workload(trace, self.workload, v["seed"])
        as_it_is = bool(v["url"]) and not arms_given(v)
        arms = [Arm("server", "the server as it is")] if as_it_is else read_arm_options(v)
        refuse_simulated(arms)
        for arm in arms:
            if v["url"] and not as_it_is and needs_own_server(arm):
                raise InputError(f"--url: arm {arm.name!r} needs a server of its own")
        share = bool(v["url"]) or (v["share"] and len(arms) > 1)
        options = BenchOptions(
            trace=trace,
            workload=self.workload,
            repeats=v["repeat"],
            seed=v["seed"],
            salt=int(time.time()) if v["salt"] is None else v["salt"],
            duration_s=v["duration"],
            load=v["load"],
            capacity_rps=v["capacity"],
            warm_up=v["warm_up"],
            slo=parse_slo(v["slo"]),
            share=share,
            timeout_s=v["timeout"],
            pin_engines=v["pin_domains"],
        )
        return options, arms, share and not as_it_is

    def _info(self, options: Any, arms: list[Any]) -> Any:
        from dataclasses import asdict

        from gimbal.records.environment import describe_environment
        from gimbal.records.schema import RunInfo

        trace = {"name": options.trace.name, "requests": len(options.trace)}
        return RunInfo(
            kind="bench",
            command=tuple(sys.argv[1:]),
            seed=options.seed,
            repeats=options.repeats,
            trace=trace | {"options": asdict(options.workload), "salt": options.salt},
            arms={arm.name: arm.to_json() for arm in arms},
            environment=describe_environment(),
            slo=options.slo.limits(),
        )

    def _pool(self, directory: Path) -> Any:
        from gimbal.bench.servers import ServerPool

        arguments = (
            *(("--demo",) if self.values["demo"] else ()),
            *self.values["server_arguments"],
        )
        return ServerPool(arguments, directory, self.values["resident"], self._say)

    def _server_of(self, pool: Any) -> Callable[[Any], Any]:
        from gimbal.bench.endpoint import Endpoint

        if self.values["url"]:
            endpoint = Endpoint(self.values["url"].rstrip("/").removesuffix("/v1"))
            return lambda spec: endpoint
        return lambda spec: pool.get(spec).endpoint

    def _vocabulary(self, endpoint: Any, cache: dict[str, Any]) -> Any:
        """Token ids of the served model, read once from its directory."""
        from gimbal.core.errors import InputError
        from gimbal.workloads.prompts import read_vocabulary

        root = str(self.values["model_dir"] or endpoint.model().root)
        if root not in cache:
            if not Path(root).is_dir():
                raise InputError(f"{endpoint.url} serves {root!r}: give its folder by --model-dir")
            cache[root] = read_vocabulary(Path(root))
        return cache[root]

    def _estimate_s(self, options: Any, session: Any, plan: list[Any], starts: int) -> float:
        from gimbal.workloads import build_workload

        span = build_workload(options.trace, session.sized_workload(), options.seed).span_s
        turn_s = span * 1.2 + options.warm_up / 4 + 8.0
        return starts * 80.0 + len(plan) * float(turn_s)

    def _say(self, text: str) -> None:
        self.console.print(text, highlight=False)

    @contextmanager
    def _bar(self) -> Iterator[_Bar]:
        columns = ("{task.description}", "{task.fields[state]}")
        progress = Progress(
            TextColumn(columns[0]),
            BarColumn(),
            TextColumn(columns[1]),
            TimeElapsedColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
            transient=True,
        )
        with progress:
            yield _Bar(progress)


def _keep_rearrangements(
    records: list[tuple[Any, Path]], arms: list[Any], share: bool, writer: Any
) -> None:
    """Copies what the servers recorded of their experts into the run, under the arm's name.

    Of a server that several placing arms share nobody can say which of them moved what.
    """
    from gimbal.bench.arms import server_spec
    from gimbal.records.schema import PlacementRecord, RebalanceRecord
    from gimbal.records.store import FILES, read_records

    owners = [(server_spec(arm, share), arm.name) for arm in arms if "placement" in arm.levels]
    names = dict(owners)
    for spec, directory in records:
        if [own for own, _ in owners].count(spec) != 1:
            continue
        for kind in (RebalanceRecord, PlacementRecord):
            path = directory / FILES[kind]
            if path.exists():
                found: Iterator[Any] = read_records(path, kind)
                writer.write(replace(record, arm=names[spec]) for record in found)


class _Bar:
    """The progress bar: one task per turn."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task = progress.add_task("starting", total=None, state="")

    def start(self, description: str) -> None:
        self._progress.reset(self._task, description=description, total=None, state="")

    def update(self, ended: int, streams: int) -> None:
        self._progress.update(self._task, completed=ended, state=f"{ended} done, {streams} open")
