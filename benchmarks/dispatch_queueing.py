"""Every dispatch policy on toy lock-step engines, with the real BurstGPT lengths.

    python benchmarks/dispatch_queueing.py [--load 0.9] [--requests 1500] [--seeds 1,2,3]

Prints mean, median and P99 of the time to first token, mean TPOT and prompt tokens computed, for
long-tailed lengths, shared prefixes and conversations. Load 0.9 is nine tenths of the request rate
at which round robin saturates, the same for every policy; prefix hits make the real load of the
policies that find them lower. Lengths: burstgpt_derived/burst_data_8000.json below $GIMBAL_DATA.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

import click
from rich.console import Console
from rich.table import Table

from gimbal.core.dispatch import POLICIES
from gimbal.core.errors import InputError
from gimbal.testing import (
    FakeMachine,
    FakeRequest,
    conversation_requests,
    poisson_requests,
    serve,
    shared_prefix_requests,
)

Lengths = list[tuple[int, int]]
Maker = Callable[[Lengths, int, int], list[FakeRequest]]

CPU = FakeMachine()
GPU = FakeMachine(
    engines=8,
    step_token_budget=2048,
    base_us=6000.0,
    token_us=12.0,
    decode_us=90.0,
    kv_tokens=400_000,
)
SMALL_CACHE = dataclasses.replace(CPU, engines=4, kv_tokens=30_000)

SCENES: dict[str, tuple[FakeMachine, Maker]] = {
    "long-tailed, 2 CPU engines": (CPU, lambda n, c, s: poisson_requests(n, 1.0, c, s)),
    "long-tailed, 4 CPU engines": (
        dataclasses.replace(CPU, engines=4),
        lambda n, c, s: poisson_requests(n, 1.0, c, s),
    ),
    "long-tailed, 8 GPU engines": (GPU, lambda n, c, s: poisson_requests(n, 1.0, 3 * c, s)),
    "40 shared prefixes of 1500, 4 CPU engines": (
        SMALL_CACHE,
        lambda n, c, s: shared_prefix_requests(40, 1500, n, 1.0, c, s),
    ),
    "300 shared prefixes of 4000, 8 GPU engines": (
        GPU,
        lambda n, c, s: shared_prefix_requests(300, 4000, n, 1.0, 3 * c, s),
    ),
    "conversations, 2 CPU engines": (CPU, lambda n, c, s: conversation_requests(n, 1.0, c, s)),
}


def burstgpt_lengths() -> Lengths:
    """The 8,000 real (prompt, output) pairs; InputError where they are not found."""
    root = Path(os.environ.get("GIMBAL_DATA", Path(__file__).parents[2] / "shared" / "data"))
    path = root / "burstgpt_derived" / "burst_data_8000.json"
    if not path.exists():
        raise InputError(f"no BurstGPT lengths at {path}: set GIMBAL_DATA")
    pairs = json.loads(path.read_text(encoding="utf-8"))["data"]
    return [(pair["input_length"], pair["output_length"]) for pair in pairs]


def at_load(load: float, machine: FakeMachine, requests: list[FakeRequest]) -> list[FakeRequest]:
    """The same requests, sped up to `load` of what round robin serves when saturated."""
    saturated = [dataclasses.replace(r, arrival_us=0.0) for r in requests]
    needed_s = serve(machine, "round-robin", saturated).duration_s
    factor = needed_s * 1e6 / load / requests[-1].arrival_us
    return [dataclasses.replace(r, arrival_us=r.arrival_us * factor) for r in requests]


@click.command()
@click.option("--load", default=0.9, show_default=True, help="share of the saturated rate")
@click.option("--requests", default=1500, show_default=True, help="per run on CPU engines")
@click.option("--seeds", default="1,2,3", show_default=True, help="runs to average")
def main(load: float, requests: int, seeds: str) -> None:
    """Compares the dispatch policies on toy engines."""
    lengths, console = burstgpt_lengths(), Console()
    for title, (machine, make) in SCENES.items():
        runs: dict[str, list[tuple[float, ...]]] = {name: [] for name in POLICIES}
        for seed in map(int, seeds.split(",")):
            workload = at_load(load, machine, make(lengths, requests, seed))
            for name in POLICIES:
                runs[name].append(dataclasses.astuple(serve(machine, name, workload)))
        table = Table(title=f"{title}, load {load}")
        for heading in ("policy", "TTFT mean s", "P50", "P99", "TPOT ms", "duration s", "tokens"):
            table.add_column(heading, justify="left" if heading == "policy" else "right")
        for name, results in runs.items():
            mean, p50, p99, tpot, duration, tokens = map(fmean, zip(*results, strict=True))
            numbers = (mean, p50, p99, tpot * 1e3, duration)
            table.add_row(name, *(f"{n:.3f}" for n in numbers), f"{tokens:.0f}")
        console.print(table)


if __name__ == "__main__":
    main()
