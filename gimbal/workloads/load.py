"""Finds a trace by name or file, and builds a run's workload from it."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from gimbal.core.errors import InputError, nearest
from gimbal.core.files import reading
from gimbal.core.named_yaml import SUFFIXES
from gimbal.core.numbers import MOST_REQUESTS, whole
from gimbal.workloads import distributions, transform
from gimbal.workloads.generate import generate
from gimbal.workloads.reader import TraceOptions, read_trace
from gimbal.workloads.scenario import load_scenario, scenario_names
from gimbal.workloads.trace import Trace

DEFAULT_RATE_RPS = 1.0
"""Arrival rate of a set of lengths when neither a rate nor a load is asked for."""


@dataclass(frozen=True, slots=True)
class BuiltinTrace:
    """A trace known by name: where it lies below the data directory, and where it comes from."""

    files: tuple[str, ...]
    source: str


BUILTIN_TRACES = {
    "burstgpt": BuiltinTrace(
        ("burstgpt/BurstGPT_1.csv", "burstgpt_derived/burst_data_8000.json"),
        "https://github.com/HPMLL/BurstGPT",
    ),
    "azure-conv": BuiltinTrace(
        ("azure2023/AzureLLMInferenceTrace_conv.csv",),
        "https://github.com/Azure/AzurePublicDataset",
    ),
    "mooncake": BuiltinTrace(
        ("mooncake/conversation_trace.jsonl",), "https://github.com/kvcache-ai/Mooncake"
    ),
}


def data_directories() -> list[Path]:
    """Where built-in traces are looked for: $GIMBAL_DATA, then ../shared/data of a checkout."""
    found = [Path(os.environ["GIMBAL_DATA"])] if os.environ.get("GIMBAL_DATA") else []
    return [*found, Path(__file__).resolve().parents[2].parent / "shared" / "data"]


def find_trace(name_or_file: str) -> Path:
    """The file of a built-in name or a path; raises InputError saying what to do."""
    builtin = BUILTIN_TRACES.get(name_or_file)
    if builtin is None:
        path = Path(name_or_file)
        with reading(f"--trace {name_or_file}"):  # a name may be too long for a file
            if path.is_file():
                return path
            if path.exists():
                raise InputError(f"--trace {name_or_file}: it is no file")
        scenarios = scenario_names()
        close = nearest(name_or_file, [*scenarios, *BUILTIN_TRACES])
        hint = close if close.startswith(" (did") else ""
        raise InputError(
            f"--trace {name_or_file}: no such file, scenario or trace{hint}; scenarios: "
            f"{', '.join(scenarios)}; traces: {', '.join(BUILTIN_TRACES)}"
        )
    for directory in data_directories():
        for file in builtin.files:
            if (directory / file).is_file():
                return directory / file
    raise InputError(
        f"--trace {name_or_file}: {builtin.files[0]} is not in $GIMBAL_DATA; "
        f"get it from {builtin.source} and set GIMBAL_DATA to its parent directory"
    )


def load_trace(name_or_file: str, options: TraceOptions | None = None) -> Trace:
    """A scenario's trace, a built-in one, or a file's (see `reader.read_trace`).

    A scenario is a packaged name or a YAML file. Raises InputError.
    """
    if name_or_file in scenario_names() or Path(name_or_file).suffix in SUFFIXES:
        if options is not None and options != TraceOptions():
            raise InputError(
                f"--trace {name_or_file}: a scenario; --trace-block-size, --trace-time-unit and "
                "--trace-tokenizer are for files"
            )
        scenario = load_scenario(name_or_file)
        return generate(scenario, scenario.requests, scenario.rate_rps, 0)
    path = find_trace(name_or_file)
    trace = read_trace(path, options)
    if not len(trace):
        raise InputError(f"{path}: no usable request in it")
    if name_or_file in BUILTIN_TRACES:
        return replace(trace, name=name_or_file, notes=())
    return replace(trace, notes=tuple(f"{path}: {note}" for note in trace.notes))


@dataclass(frozen=True, slots=True)
class WorkloadOptions:
    """What a run takes from a trace; defaults leave it as it is.

    Attributes:
        requests: how many requests, from a place the seed decides; None takes all. Those of a
            scenario are generated from the seed; a trace with fewer is repeated.
        distribution: one of `distributions.DISTRIBUTIONS`, or None for the trace's own lengths.
        arrivals: "trace" keeps the trace's times; "poisson" or "gamma" generates them.
        cv: coefficient of variation of gamma gaps.
        rate_rps: mean arrival rate; None keeps the trace's (or 1/s for a set of lengths).
        scale_time: multiplies arrival times, after the rate.
        scale_length: multiplies prompt, output and prefix-block lengths.
        max_prompt, max_output, max_total: longer ones are cut to these.
    """

    requests: int | None = None
    distribution: str | None = None
    arrivals: str = "trace"
    cv: float = 2.0
    rate_rps: float | None = None
    scale_time: float = 1.0
    scale_length: float = 1.0
    max_prompt: int | None = None
    max_output: int | None = None
    max_total: int | None = None

    def before_scaling(self, rate_rps: float) -> float:
        """The `rate_rps` to set for requests that come at `rate_rps` once times are scaled."""
        return rate_rps * self.scale_time


def build_workload(
    trace: Trace, options: WorkloadOptions, seed: int, domains: tuple[str, ...] = ()
) -> Trace:
    """The requests of one run: the same options and seed give the same requests.

    Raises InputError for a count, rate or limit that makes no sense.
    """
    rng = np.random.default_rng([seed, 0x617272])
    count = len(trace) if options.requests is None else options.requests
    count = whole(count, "--requests ", 1, MOST_REQUESTS)
    if trace.scenario is not None:
        rate = options.rate_rps or trace.scenario.rate_rps
        trace = generate(trace.scenario, count, rate, seed)
    if options.distribution is not None:
        if options.distribution not in distributions.DISTRIBUTIONS:
            distributions.weights(options.distribution, trace.prompt_tokens)
        built = transform.reshape_lengths(trace, options.distribution, count, rng)
    else:
        built = transform.window(trace, count, rng)
    if options.scale_length != 1.0:
        built = transform.scale_lengths(built, options.scale_length)
    built = transform.limit_lengths(
        built, options.max_prompt, options.max_output, options.max_total
    )
    process = options.arrivals
    if process == "trace" and not trace.has_arrivals:
        process = "gamma"
    if process != "trace":
        rate = options.rate_rps or built.rate_rps or DEFAULT_RATE_RPS
        built = transform.generate_arrivals(built, process, rate, options.cv, rng)
    if options.rate_rps is not None:
        built = transform.set_rate(built, options.rate_rps)
    if options.scale_time != 1.0:
        built = transform.scale_time(built, options.scale_time)
    return transform.assign_domains(built, domains, rng)
