"""``gimbal calibrate``: measure this machine and write a cost-model profile."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from gimbal.commands.options import FIGURES, OutFile, OutFolder, Real, Whole
from gimbal.commands.output import Bar, echo_json, notes, progress_bar
from gimbal.core.errors import InputError, one_line
from gimbal.core.model import read_config
from gimbal.core.model.architecture import KV_DTYPES
from gimbal.core.numbers import MOST_RANKS

if TYPE_CHECKING:
    from gimbal.bench.calibration_load import PhaseTimes
    from gimbal.bench.client import Replay
    from gimbal.bench.client_process import ReplayJob
    from gimbal.bench.endpoint import Endpoint
    from gimbal.core.cost.calibrate import StepFit, StepSample
    from gimbal.core.cost.profile import ModelShape, Profile
    from gimbal.workloads.trace import Trace

UNSTEADY = 1.6
"""Ratio of slowest to fastest tenth beyond which something else ran on the machine."""
PHASES = "phases.json"
"""Beside the step records of a calibration: where its requests spent their time."""
RANKS = Whole(1, MOST_RANKS)
ENGINE_TIMES = ("vllm:request_queue_time_seconds_sum", "vllm:request_prefill_time_seconds_sum")


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--demo", is_flag=True, help="start `gimbal serve --demo` and drive it")
@click.option(
    "--from-steps",
    type=click.Path(path_type=Path),
    help="fit the step records of a server that ran with the configuration key step_records",
)
@click.option("--estimate", help="no measurement: derive from the model and this GPU's data sheet")
@click.option("--model-dir", type=click.Path(path_type=Path), help="model (config.json) served")
@click.option(
    "--kv-cache-dtype",
    type=click.Choice(["auto", *KV_DTYPES]),
    default="auto",
    show_default=True,
    help="as the server has it; auto is the checkpoint's",
)
@click.option("--name", default="cpu-demo", show_default=True, help="name of the profile")
@click.option("--out", type=OutFile(), help="profile to write (default: NAME.yaml)")
@click.option(
    "--dp", type=RANKS, default=2, show_default=True, help="data-parallel size of the server"
)
@click.option(
    "--tp", type=RANKS, default=1, show_default=True, help="tensor-parallel size of the server"
)
@click.option(
    "--kv-tokens", type=Whole(), default=0, help="KV cache of one engine in tokens, if known"
)
@click.option(
    "--span",
    "span_s",
    default=14.0,
    show_default=True,
    type=Real(2.0, 1e6),
    help="seconds of each mixed load; fewer make a quicker, coarser calibration",
)
@click.option("--keep-steps", type=OutFolder(), help="folder to keep the step records in")
@click.option("--plot", type=OutFile(FIGURES), help="predicted against measured steps")
@click.option("--json", "as_json", is_flag=True, help="print one JSON object")
@click.argument("server_arguments", nargs=-1, type=click.UNPROCESSED)
def command(**values: Any) -> None:
    """Fit a profile to what steps of known composition took, and say how well it fits.

    Either drive a server (--demo, or a model and vLLM flags after `--`), or fit records that a
    server has written already (--from-steps DIR --model-dir MODEL), or estimate without any
    machine (--estimate GPU --model-dir MODEL).

    Example: gimbal calibrate --estimate h100 --model-dir path/to/model --dp 8 --name mine
    """
    from gimbal.core.cost.calibrate import fit_steps, profile_from_fit
    from gimbal.core.cost.profile import Layout

    if values["estimate"] is not None:
        _estimate(values)
        return
    out = _target(values)
    console = notes()
    sources = (values["from_steps"] is not None, values["demo"], bool(values["server_arguments"]))
    if sum(sources) != 1:
        raise InputError("give one of --from-steps DIR, --demo, or a model after `--`")
    with (
        progress_bar(console, "starting a server") as bar,
        tempfile.TemporaryDirectory(prefix="gimbal-steps-") as scratch,
    ):
        directory, model_dir = values["from_steps"], values["model_dir"]
        if directory is None:
            directory = values["keep_steps"] or Path(scratch)
            model_dir = _drive(values, directory, console, bar)
        if model_dir is None:
            raise InputError("--from-steps: give the served model's folder by --model-dir")
        bar.say("fitting")
        samples = _samples(directory)
        api_us = _front_end_us(directory, samples)
        if (directory / PHASES).exists():
            samples = _warm(samples)
        layout = Layout(values["dp"], values["tp"])
        model = _model_shape(model_dir, values["kv_cache_dtype"], console)
        try:
            fit = fit_steps(samples, model, layout.ep)
        except ValueError as error:
            raise InputError(f"{directory}: {one_line(error)}") from None
    profile = profile_from_fit(fit, values["name"], _machine(), layout, values["kv_tokens"], api_us)
    _write_profile(profile, out)
    if values["plot"] is not None:
        from gimbal.report.plots import plot_fit

        measured = [s.duration_us / 1e3 for s in samples]
        plot_fit(measured, (fit.predict_us(samples) / 1e3).tolist(), values["plot"])
    _tell(fit, out, values["as_json"])


def _tell(fit: StepFit, out: Path, as_json: bool) -> None:
    if as_json:
        report = {
            "profile": str(out),
            "coefficients_us": fit.coefficients_us,
            "steps": fit.steps,
            "held_out": fit.held_out,
            "error": fit.error,
            "bias": fit.bias,
            "p90_error": fit.p90_error,
            "slowness": fit.slowness,
        }
        echo_json(report)
        return
    for name, value in fit.coefficients_us.items():
        click.echo(f"{name:16s} {value:12.4g} us")
    click.echo(
        f"{fit.steps} steps fitted; on {fit.held_out} held-out steps: mean relative error "
        f"{fit.error:.1%}, P90 {fit.p90_error:.1%}, bias {fit.bias:+.1%}"
    )
    low, high = fit.slowness
    click.echo(f"tenths of the run took {low:.2f} to {high:.2f} of the predicted time", nl=False)
    steady = high / low < UNSTEADY
    click.echo("" if steady else ": the machine was not steady, calibrate again when it is idle")
    click.echo(f"wrote {out}")


def _samples(directory: Path) -> list[StepSample]:
    from gimbal.records.schema import StepRecord
    from gimbal.records.steps import join_steps
    from gimbal.records.store import read_records

    files = sorted(directory.glob("steps-*.jsonl"))
    if not files:
        raise InputError(f"{directory}: no steps-N.jsonl in it")
    return join_steps([list(read_records(file, StepRecord)) for file in files])


def _front_end_us(directory: Path, samples: list[StepSample]) -> float:
    """Time outside the engine, from the requests of a calibration; 0 for other records."""
    from gimbal.bench.calibration_load import PhaseTimes, front_end_us
    from gimbal.core.json_text import read_json
    from gimbal.records.store import build

    path = directory / PHASES
    if not path.exists():
        return 0.0
    rows = read_json(path)
    if not isinstance(rows, list):
        raise InputError(f"{path}: expected a JSON list")
    phases = [build(PhaseTimes, row, f"{path}: phase {n}") for n, row in enumerate(rows, start=1)]
    return round(front_end_us(phases, samples), 1)


def _warm(samples: list[StepSample]) -> list[StepSample]:
    from gimbal.bench.calibration_load import WARM_UP_S

    return [s for s in samples if s.time_s - samples[0].time_s > WARM_UP_S]


def _machine() -> str:
    """Processor, cores and GPUs, as a profile names them."""
    name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores, {_gpus() or 'no GPU'}"


def _gpus() -> str:
    """Names of NVIDIA GPUs by their driver's own list; empty where there is none."""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    counts = Counter(line.strip() for line in listed.stdout.splitlines() if line.strip())
    return ", ".join(f"{count} x {gpu}" for gpu, count in sorted(counts.items()))


def _model_shape(model_dir: Path, kv_dtype: str, console: Console | None = None) -> ModelShape:
    """Of a model that is measured: what its KV cache holds need not be known for that."""
    from gimbal.core.cost.derive import model_shape
    from gimbal.core.model import read_architecture

    config = read_config(model_dir)
    try:
        return model_shape(read_architecture(config), kv_dtype)
    except InputError as unknown:
        shape = model_shape(read_architecture(config, cached=False))
        if console is not None:
            console.print(f"note: {unknown}; kv_bytes_per_token is 0")
        return shape


def _estimate(values: dict[str, Any]) -> None:
    from gimbal.core.cost.derive import derive_profile
    from gimbal.core.cost.profile import Layout

    if values["model_dir"] is None:
        raise InputError("--estimate: give the model's folder (its config.json) by --model-dir")
    layout = Layout(values["dp"], values["tp"])
    config = read_config(values["model_dir"])
    gpu, kv_dtype = values["estimate"], values["kv_cache_dtype"]
    profile = derive_profile(values["name"], config, gpu, layout, kv_dtype)
    out = _target(values)
    _write_profile(profile, out)
    for remark in profile.notes[1:]:  # the first says that it is an estimate
        click.echo(f"note: {remark}", err=True)
    if values["as_json"]:
        echo_json({"profile": str(out), "estimated": True})
        return
    click.echo(f"wrote {out}: an estimate from data sheets, not a measurement")


def _write_profile(profile: Profile, out: Path) -> None:
    """Raises InputError for a fit that no profile can hold, or a file that cannot be written."""
    from gimbal.core.cost.profile import dump_profile, parse_profile
    from gimbal.core.files import write_text
    from gimbal.core.yaml_reader import parse_yaml

    text = dump_profile(profile)
    parse_profile(parse_yaml(text, str(out)), str(out))
    write_text(out, text)


def _target(values: dict[str, Any]) -> Path:
    """The profile's file; raises InputError for a name that cannot be one's."""
    out: Path = values["out"] or Path(f"{values['name']}.yaml")
    if values["out"] is None and out.name != str(out):
        raise InputError(f"--name {values['name']!r}: expected a word; a file is given by --out")
    return out


def _drive(values: dict[str, Any], directory: Path, console: Console, bar: Bar) -> Path:
    """`_measure` with what can be refused refused first; a server's failure ends the command."""
    from gimbal.bench.run import check_vocabulary
    from gimbal.core.files import writing

    arguments = (*(("--demo",) if values["demo"] else ()), *values["server_arguments"])
    check_vocabulary(arguments, values["model_dir"])
    if values["model_dir"] is not None:
        _model_shape(values["model_dir"], values["kv_cache_dtype"])
    with writing(f"--keep-steps {directory}"):
        directory.mkdir(parents=True, exist_ok=True)
    try:
        return _measure(values, arguments, directory, console, bar)
    except RuntimeError as error:
        raise click.ClickException(str(error)) from error


def _measure(
    values: dict[str, Any], arguments: tuple[str, ...], directory: Path, console: Console, bar: Bar
) -> Path:
    """Serves, sends the phases of `calibration_load`, stops; returns the model's folder."""
    from gimbal.bench.arms import ServerSpec
    from gimbal.bench.client_process import ReplayJob, run_replay
    from gimbal.bench.servers import ServerPool
    from gimbal.core.files import write_text
    from gimbal.core.json_text import to_json
    from gimbal.workloads.prompts import read_vocabulary

    # FCFS and vLLM's own placement: a step's cost must not depend on Gimbal's choices.
    config = {"levels": ["dispatch"], "step_records": str(directory)}
    pool = ServerPool(arguments, directory, 1, lambda text: console.print(text, highlight=False))
    try:
        endpoint = pool.get(ServerSpec((), json.dumps(config))).endpoint
        model = endpoint.model()
        folder = Path(values["model_dir"] or model.root)
        vocabulary = read_vocabulary(folder)

        def job(trace: Trace, number: int) -> ReplayJob:
            salt = (0xCA1, number)
            return ReplayJob(endpoint.url, model.name, trace, vocabulary, salt, f"cal{number}")

        def replay(one: ReplayJob) -> Replay:
            result = run_replay(one, bar.requests)
            endpoint.wait_idle()
            return result

        def say(text: str) -> None:
            console.print(f"calibrating: {text}", highlight=False)
            bar.say(text)

        context = model.max_model_len or 4096
        phases = _send(endpoint, context, values["span_s"], job, replay, say)
        text = to_json([dataclasses.asdict(phase) for phase in phases])
        write_text(directory / PHASES, text)
    finally:
        pool.close()
    return folder


def _send(
    endpoint: Endpoint,
    context: int,
    span_s: float,
    job: Callable[[Trace, int], ReplayJob],
    replay: Callable[[ReplayJob], Replay],
    say: Callable[[str], None],
) -> list[PhaseTimes]:
    """Sends every phase; returns the times of those that time the front end."""
    from gimbal.bench import calibration_load as load
    from gimbal.bench.capacity import measure_capacity

    say("warming up; what rate the server sustains")
    typical = load.mixed(context, 400, 1.0, 0)
    capacity = measure_capacity(job(typical, 0), replay, span_s=load.WARM_UP_S).rate_rps
    phases = []
    for number, share in enumerate(load.LOADS, 1):
        rate = share * capacity
        say(f"prefill and decode mixed, {rate:.1f} requests/s")
        count = max(20, round(rate * span_s))
        one = job(load.mixed(context, count, rate, number), number)
        phase = _timed(endpoint, partial(replay, one))
        if share <= load.FRONT_END_LOAD:
            phases.append(phase)
        if number == len(load.LOADS) // 2:
            say("decode batches by size and context")
            replay(job(load.batches(context), 100))
    say("one prompt at a time")
    replay(job(load.alone(context), 101))
    return phases


def _timed(endpoint: Endpoint, run: Callable[[], Replay]) -> PhaseTimes:
    """Runs a phase; returns where its requests spent the time to their first tokens."""
    from gimbal.bench.calibration_load import PhaseTimes
    from gimbal.bench.endpoint import counter_differences

    before, began_s = endpoint.counters(ENGINE_TIMES), time.monotonic()
    results = [r for r in run().results if r.token_times_s]
    ended_s = time.monotonic()
    spent = counter_differences(before, endpoint.counters(ENGINE_TIMES))
    engine_s = sum(sum(by_engine.values()) for by_engine in spent.values())
    ttft_s = sum(r.token_times_s[0] - r.sent_s for r in results)
    count = max(1, len(results))
    return PhaseTimes(ttft_s / count * 1e6, engine_s / count * 1e6, began_s, ended_s, len(results))
