"""The options that ``gimbal bench`` and ``gimbal simulate`` share: which requests, how fast."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click

from gimbal.core.errors import InputError
from gimbal.workloads import BUILTIN_TRACES, WorkloadOptions
from gimbal.workloads.arrivals import PROCESSES
from gimbal.workloads.distributions import DISTRIBUTIONS

Function = TypeVar("Function", bound=Callable[..., Any])

MAX_PROMPT = click.option("--max-prompt", type=int, help="cut longer prompts to this many tokens")
MAX_OUTPUT = click.option("--max-output", type=int, help="cut longer outputs to this many tokens")

_OPTIONS = [
    click.option(
        "--trace",
        "trace_name",
        default="burstgpt",
        show_default=True,
        help=f"trace file, or one of {', '.join(BUILTIN_TRACES)}",
    ),
    click.option(
        "--requests",
        type=int,
        help="requests per run (default: whole trace; bench: see --duration)",
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
    click.option("--cv", default=2.0, show_default=True, help="CV of gamma gaps (1: Poisson)"),
    click.option("--rate", type=float, help="mean requests per second; bursts keep their shape"),
    click.option("--scale-time", default=1.0, show_default=True, help="multiply arrival times"),
    click.option(
        "--scale-length",
        default=1.0,
        show_default=True,
        help="multiply prompt, output and prefix-block lengths",
    ),
    MAX_PROMPT,
    MAX_OUTPUT,
    click.option("--seed", default=0, show_default=True, help="of every random choice"),
    click.option("--repeat", default=1, show_default=True, help="turns of every arm"),
]


def workload_options(function: Function) -> Function:
    """Adds the shared options to a command; `read_workload_options` takes most of them back."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


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
    """Raises InputError for a ``--load``, ``--repeat`` or ``--seed`` that says nothing."""
    load = values["load"]
    if load is not None and not 0 < load < float("inf"):
        raise InputError(f"--load {load:g}: expected a number > 0")
    if load is not None and workload.rate_rps is not None:
        raise InputError("--load and --rate both set the arrival rate: give one")
    for name, least in (("repeat", 1), ("seed", 0)):
        if values[name] < least:
            raise InputError(f"--{name} {values[name]}: expected a whole number >= {least}")
