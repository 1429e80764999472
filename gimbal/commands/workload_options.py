"""The options that ``gimbal bench`` and ``gimbal simulate`` share: which requests, how fast."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from gimbal.commands.options import NameOrFile, Real, Whole
from gimbal.core.errors import InputError
from gimbal.core.numbers import MOST_REQUESTS, MOST_TOKENS
from gimbal.workloads import BUILTIN_TRACES, Trace, TraceOptions, WorkloadOptions, load_trace
from gimbal.workloads.arrivals import LEAST_CV, LEAST_RPS, MOST_CV, PROCESSES
from gimbal.workloads.distributions import DISTRIBUTIONS
from gimbal.workloads.formats import UNITS
from gimbal.workloads.scenario import DEFAULT_SCENARIO, scenario_names

Function = TypeVar("Function", bound=Callable[..., Any])

RATE = Real(LEAST_RPS, 1e9)
SEED = Whole()
TURNS = Whole(1, 10_000)
LOAD = Real(above=0.0, most=1000.0)
SECONDS = Real(above=0.0, most=1e7)
SERVERS = Whole(1, 256)
_TOKENS, _FACTOR = Whole(1, MOST_TOKENS), Real(above=0.0, most=1e9)

MAX_PROMPT = click.option(
    "--max-prompt", type=_TOKENS, help="cut longer prompts to this many tokens"
)
MAX_OUTPUT = click.option(
    "--max-output", type=_TOKENS, help="cut longer outputs to this many tokens"
)

_OPTIONS = [
    click.option(
        "--trace",
        "trace_name",
        type=NameOrFile(lambda: [*scenario_names(), *BUILTIN_TRACES]),
        metavar="NAME|FILE",
        default=DEFAULT_SCENARIO,
        show_default=True,
        help=f"scenario ({', '.join(scenario_names())}), trace file, or one of "
        f"{', '.join(BUILTIN_TRACES)}",
    ),
    click.option(
        "--trace-block-size",
        type=_TOKENS,
        help="tokens of a prefix block of the trace (default: as its format has them)",
    ),
    click.option(
        "--trace-time-unit",
        type=click.Choice(list(UNITS)),
        help="unit of the trace's times (default: as its format has them)",
    ),
    click.option(
        "--trace-tokenizer",
        type=click.Path(path_type=Path),
        help="folder of tokenizer.json, for traces of texts (default: 4 bytes per token)",
    ),
    click.option(
        "--requests",
        type=Whole(1, MOST_REQUESTS),
        help="requests per run (default: whole trace, a scenario's own; bench: see --duration)",
    ),
    click.option(
        "--distribution",
        type=click.Choice(DISTRIBUTIONS),
        help="redraw real rows so that prompt lengths follow this shape",
    ),
    click.option(
        "--arrivals",
        type=click.Choice(PROCESSES),
        default="trace",
        show_default=True,
        help="arrival times; a trace without any gets gamma",
    ),
    click.option(
        "--cv",
        type=Real(LEAST_CV, MOST_CV),
        default=2.0,
        show_default=True,
        help="CV of gamma gaps (1: Poisson)",
    ),
    click.option("--rate", type=RATE, help="mean requests per second; bursts keep their shape"),
    click.option(
        "--scale-time",
        type=_FACTOR,
        default=1.0,
        show_default=True,
        help="multiply arrival times",
    ),
    click.option(
        "--scale-length",
        type=_FACTOR,
        default=1.0,
        show_default=True,
        help="multiply prompt, output and prefix-block lengths",
    ),
    MAX_PROMPT,
    MAX_OUTPUT,
    click.option("--seed", type=SEED, default=0, show_default=True, help="of every random choice"),
    click.option("--repeat", type=TURNS, default=1, show_default=True, help="turns of every arm"),
]


def workload_options(function: Function) -> Function:
    """Adds the shared options to a command; `read_workload_options` takes most of them back."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def read_trace_options(values: dict[str, Any]) -> Trace:
    """The trace that the command's keyword arguments name; raises InputError."""
    options = TraceOptions(
        values["trace_block_size"], values["trace_time_unit"], values["trace_tokenizer"]
    )
    return load_trace(values["trace_name"], options)


def read_workload_options(values: dict[str, Any]) -> WorkloadOptions:
    """`WorkloadOptions` from the command's keyword arguments, which lose what it takes."""
    return WorkloadOptions(
        requests=values.pop("requests"),
        distribution=values.pop("distribution"),
        arrivals=values.pop("arrivals"),
        cv=values.pop("cv"),
        rate_rps=values.pop("rate"),
        scale_time=values.pop("scale_time"),
        scale_length=values.pop("scale_length"),
        max_prompt=values.pop("max_prompt"),
        max_output=values.pop("max_output"),
    )


def check_run_options(values: Mapping[str, Any], workload: WorkloadOptions) -> None:
    """Raises InputError for options that contradict each other."""
    if values["load"] is not None and workload.rate_rps is not None:
        raise InputError("--load and --rate both set the arrival rate: give one")
