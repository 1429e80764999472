"""Every dispatch policy in the simulator, on lengths from BurstGPT.

    python benchmarks/dispatch_queueing.py [--load 0.9] [--requests 1500] [--seeds 1,2,3]

Prints mean, median and P99 of the time to first token, mean TPOT and prompt tokens computed, for
long-tailed lengths, shared prefixes and conversations. Load 0.9 is nine tenths of the request rate
that round robin can do, the same for every policy; prefix hits make the real load of the policies
that find them lower. Experts stay where they start.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from gimbal.core.cost.profile import Profile
from gimbal.core.dispatch import POLICIES
from gimbal.report.arms import Arm
from gimbal.sim.capacity import find_capacity
from gimbal.sim.cluster import Cluster, load_cluster
from gimbal.sim.probes import Bed, replayed
from gimbal.sim.routing import named_population
from gimbal.sim.run import Simulation
from gimbal.workloads import load_trace
from gimbal.workloads.trace import Trace, TraceRequest, make_trace
from gimbal.workloads.transform import set_rate

BLOCK_TOKENS = 128
"""Tokens of one block of a shared prefix."""

Lengths = list[tuple[int, int]]
Maker = Callable[[Lengths, int, int], Trace]


@dataclass(frozen=True, slots=True)
class Outcome:
    """One run, without the first tenth of its requests: the engines start empty."""

    ttft_mean_s: float
    ttft_p50_s: float
    ttft_p99_s: float
    tpot_mean_s: float
    duration_s: float
    computed_tokens: int


def _arm(policy: str) -> Arm:
    config = {"levels": ["dispatch"], "dispatch": {"policy": policy}}
    return Arm(policy, config=config, flags=("--no-enable-eplb",))


def serve(cluster: Cluster, profile: Profile, policy: str, trace: Trace) -> Outcome:
    """Simulates `trace` on `cluster` under a dispatch policy and vLLM's queue."""
    population = named_population(cluster.routing, profile)
    simulation = Simulation(trace, cluster, profile, population, _arm(policy))
    result = simulation.run()
    settled = result.records[len(result.records) // 10 :]
    ttft = [r.first_token_s - r.arrival_s for r in settled]
    tpot = [
        (r.last_token_s - r.first_token_s) / (r.output_tokens - 1)
        for r in settled
        if r.output_tokens > 1
    ]
    return Outcome(
        fmean(ttft),
        float(np.quantile(ttft, 0.5)),
        float(np.quantile(ttft, 0.99)),
        fmean(tpot),
        result.duration_s,
        sum(engine.served_prefill_tokens for engine in simulation.answering.engines),
    )


def at_load(load: float, cluster: Cluster, profile: Profile, trace: Trace) -> Trace:
    """The same requests at `load` of the rate that round robin can do."""
    population = named_population(cluster.routing, profile)
    arm = _arm("round-robin")
    bed = Bed(cluster, profile, population, arm)
    found = find_capacity(bed, replayed(trace), requests=len(trace))
    return set_rate(trace, load * found.rate_rps)


def unrelated(lengths: Lengths, count: int, seed: int) -> Trace:
    """Prompts that share nothing, one a second on average, lengths drawn from `lengths`."""
    rng = np.random.default_rng(seed)
    arrivals = np.cumsum(rng.exponential(1.0, count)).tolist()
    drawn = [lengths[i] for i in rng.integers(len(lengths), size=count)]
    rows = [TraceRequest(at, *pair) for at, pair in zip(arrivals, drawn, strict=True)]
    return make_trace("unrelated", rows)


def shared_prefixes(lengths: Lengths, count: int, seed: int, prefixes: int, blocks: int) -> Trace:
    """As `unrelated`, each behind one of `prefixes` system prompts (Zipf-popular) of `blocks`."""
    rng = np.random.default_rng(seed)
    weights = 1.0 / np.arange(1, prefixes + 1)
    chosen = rng.choice(prefixes, size=count, p=weights / weights.sum()).tolist()
    rows = [
        dataclasses.replace(
            request,
            prompt_tokens=request.prompt_tokens + blocks * BLOCK_TOKENS,
            prefix_blocks=tuple(range(prefix * blocks, (prefix + 1) * blocks)),
        )
        for request, prefix in zip(unrelated(lengths, count, seed).requests, chosen, strict=True)
    ]
    return make_trace("shared-prefixes", rows, BLOCK_TOKENS)


def conversations(
    lengths: Lengths, count: int, seed: int, turns: int = 5, think_s: float = 20.0
) -> Trace:
    """Conversations of `turns` turns; every prompt repeats what was said before."""
    rng = np.random.default_rng(seed)
    starts = np.cumsum(rng.exponential(turns, -(-count // turns))).tolist()
    due = [(at, session, 0, 0) for session, at in enumerate(starts)]
    rows: list[TraceRequest] = []
    while due and len(rows) < count:
        at, session, turn, context = heapq.heappop(due)
        prompt, output = lengths[int(rng.integers(len(lengths)))]
        said = context + prompt
        blocks = tuple((session << 16) + i for i in range(said // BLOCK_TOKENS))
        rows.append(TraceRequest(at, said, output, f"session-{session}", prefix_blocks=blocks))
        if turn + 1 < turns:
            later = at + float(rng.exponential(think_s))
            heapq.heappush(due, (later, session, turn + 1, said + output))
    return make_trace("conversations", rows, BLOCK_TOKENS)


def scenes() -> dict[str, tuple[Cluster, Profile, Maker]]:
    """What is simulated, by title."""
    cpu, cpu_profile = load_cluster("cpu-demo")
    gpu, gpu_profile = load_cluster("h100x8-dp8")
    four = dataclasses.replace(cpu, dp=4)
    small = dataclasses.replace(four, kv_tokens=30_000)
    return {
        "long-tailed, 2 CPU engines": (cpu, cpu_profile, unrelated),
        "long-tailed, 4 CPU engines": (four, cpu_profile, unrelated),
        "long-tailed, 8 GPU engines": (
            gpu,
            gpu_profile,
            lambda n, c, s: unrelated(n, 3 * c, s),
        ),
        "40 shared prefixes of 1,536 tokens, 4 CPU engines": (
            small,
            cpu_profile,
            lambda n, c, s: shared_prefixes(n, c, s, 40, 12),
        ),
        "300 shared prefixes of 4,096 tokens, 8 GPU engines": (
            gpu,
            gpu_profile,
            lambda n, c, s: shared_prefixes(n, 3 * c, s, 300, 32),
        ),
        "conversations, 2 CPU engines": (cpu, cpu_profile, conversations),
    }


@click.command()
@click.option("--load", default=0.9, show_default=True, help="share of the saturated rate")
@click.option("--requests", default=1500, show_default=True, help="per run on CPU engines")
@click.option("--seeds", default="1,2,3", show_default=True, help="runs to average")
def main(load: float, requests: int, seeds: str) -> None:
    """Compares the dispatch policies in the simulator."""
    rows = load_trace("burstgpt").requests
    lengths = [(min(8000, r.prompt_tokens), min(1000, r.output_tokens)) for r in rows]
    console = Console()
    for title, (cluster, profile, make) in scenes().items():
        runs: dict[str, list[tuple[float, ...]]] = {name: [] for name in POLICIES}
        for seed in map(int, seeds.split(",")):
            trace = at_load(load, cluster, profile, make(lengths, requests, seed))
            for name in POLICIES:
                runs[name].append(dataclasses.astuple(serve(cluster, profile, name, trace)))
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
