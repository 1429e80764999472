"""Which queue ordering, and which defaults: a small lock-step simulation of the queue alone.

    python benchmarks/queue_ordering.py [--trace burstgpt] [--load 0.9] [--plot curve.png]

Two engines in lock step, chunked prefill, vLLM's dispatch by request counts. A step lasts ``25 ms
+ 0.5 ms per prefill token + 0.5 ms per decode`` of its slowest engine, as on a slow CPU;
``--step-ms 10 0.08 0.45`` is the demo model on two cores, where decoding is the larger part. The
queue, the orderings and the budget rules are the product's own. Prints mean and P99 TTFT and mean
TPOT, each also relative to FCFS, over the aging parameters and over vLLM's static settings. The
seeds are kept apart from those of reported results. A tool for choosing defaults, not a result.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from gimbal.core.contracts import QueuedRequest, QueueOrdering, QueueState
from gimbal.core.queue import ORDERINGS
from gimbal.core.queue.budget import (
    NEWCOMERS,
    StepCost,
    protected_prefill_tokens,
    running_candidate,
    share_prefill_budget,
    waiting_candidate,
)
from gimbal.core.queue.gimbal import GimbalOrdering, GimbalOrderingOptions
from gimbal.core.queue.heap import Entry, WaitingHeap
from gimbal.workloads.load import load_trace

STEP_MS = [25.0, 0.5, 0.5]  # base, per prefill token, per decode
ENGINES, BUDGET, SEATS = 2, 512, 128
MAX_PROMPT, MAX_OUTPUT = 3000, 200
TUNING_SEEDS = range(9000, 9012)

Pair = tuple[int, int]


@dataclass(slots=True)
class Job:
    """A request on an engine: its place in the queue, prompt left, tokens produced."""

    entry: Entry[int]
    left: int
    output: int
    produced: int = 0


@dataclass(slots=True)
class Engine:
    heap: WaitingHeap[int]
    jobs: list[Job] = field(default_factory=list)
    rate: float = field(default_factory=lambda: 1e3 / STEP_MS[1])
    prefilled: int = 0  # in the last step
    backlog: int = 0  # prefill left after the last step
    saturated: bool = False  # vLLM lifts its interval when a prefill step left somebody waiting
    served: float = 0.0

    def load(self) -> int:
        return len(self.heap) + len(self.jobs)

    def work_ms(self) -> float:
        """Prefill that waits or runs, and four steps of every request, as time."""
        tokens = self.heap.waiting_tokens + sum(j.left for j in self.jobs)
        return STEP_MS[1] * tokens + 4 * STEP_MS[2] * self.load()


@dataclass(frozen=True, slots=True)
class Arm:
    """An ordering and what happens inside the batch."""

    ordering: Callable[[], QueueOrdering]
    in_batch: bool = False
    tpot_factor: float | None = None
    patience_steps: float = 8.0
    max_wait_s: float | None = None
    by_tokens: bool = False  # dispatch by prefill work and decodes, not by request counts
    budget: int = BUDGET  # vLLM's --max-num-batched-tokens
    long_prefill: int = 0  # vLLM's --long-prefill-token-threshold
    interval: int = 1  # vLLM's --prefill-schedule-interval


def step(engine: Engine, arm: Arm, now_s: float, others: int, number: int) -> float:
    """One engine's part of a step; returns how long it takes."""
    decodes = [j for j in engine.jobs if j.left == 0]
    prefills = [j for j in engine.jobs if j.left > 0]
    budget = arm.budget - len(decodes)
    throttled = number % arm.interval and decodes and not engine.saturated
    if throttled:
        budget = 0
    longest = arm.long_prefill if arm.long_prefill and engine.load() > 1 else budget
    if arm.tpot_factor is not None:
        backlog = engine.heap.waiting_tokens + sum(j.left for j in prefills)
        cost = StepCost(STEP_MS[0] + STEP_MS[2] * len(decodes), STEP_MS[1])
        budget = protected_prefill_tokens(
            cost,
            budget,
            len(decodes),
            max(backlog, others),
            tpot_factor=arm.tpot_factor,
            patience_steps=arm.patience_steps,
            min_tokens=16,
        )
    state = QueueState(now_s, engine.rate, len(engine.heap), 0, engine.served)
    engine.heap.refresh(state)
    shares = [j.left for j in prefills]
    if arm.in_batch and prefills and len(engine.heap):
        heads = engine.heap.first(min(NEWCOMERS, SEATS - len(engine.jobs)))
        shares = share_prefill_budget(
            [
                running_candidate(j.entry, engine.heap, now_s, j.left, longest, strict=False)
                for j in prefills
            ],
            [waiting_candidate(e, longest, strict=False) for e in heads],
            budget,
        )
    spent = 0
    for job, share in zip(prefills, shares, strict=True):
        grant = min(share, budget - spent, longest)
        job.left -= grant
        spent += grant
    while spent < budget and len(engine.heap) and len(engine.jobs) < SEATS:
        entry = engine.heap.pop(now_s)
        tokens, output = entry.request.uncached_tokens, entry.item
        grant = min(tokens, budget - spent, longest)
        spent += grant
        engine.served += tokens
        engine.jobs.append(Job(entry, tokens - grant, output))
    engine.prefilled = spent
    if not throttled:
        engine.saturated = len(engine.heap) > 0
    engine.backlog = engine.heap.waiting_tokens + sum(j.left for j in engine.jobs)
    return (STEP_MS[0] + STEP_MS[1] * spent + STEP_MS[2] * len(decodes)) / 1e3


def simulate(requests: list[tuple[float, int, int]], arm: Arm) -> tuple[list[float], list[float]]:
    """TTFT of each request and TPOT of those with more than one token, seconds."""
    engines = [Engine(WaitingHeap(arm.ordering(), arm.max_wait_s)) for _ in range(ENGINES)]
    now_s, following, left, number = 0.0, 0, len(requests), 0
    load = Engine.work_ms if arm.by_tokens else Engine.load
    ttft = [0.0] * left
    tpot = []
    while left:
        if not any(e.load() for e in engines):
            now_s = max(now_s, requests[following][0])
        while following < len(requests) and requests[following][0] <= now_s:
            arrival_s, tokens, output = requests[following]
            engine = min(engines, key=load)
            state = QueueState(now_s, engine.rate, len(engine.heap), 0, engine.served)
            queued = QueuedRequest(str(following), arrival_s, tokens, 0, engine.served)
            engine.heap.add(queued, output, state)
            following += 1
        before = [e.backlog for e in engines]
        elapsed_s = max(
            step(e, arm, now_s, max(before[:i] + before[i + 1 :]), number)
            for i, e in enumerate(engines)
        )
        now_s += elapsed_s
        number += 1
        for engine in engines:
            if engine.prefilled >= BUDGET // 4:
                engine.rate += 0.1 * (engine.prefilled / elapsed_s - engine.rate)
            for job in [j for j in engine.jobs if j.left == 0]:
                job.produced += 1
                index = int(job.entry.request.request_id)
                if job.produced == 1:
                    ttft[index] = now_s - requests[index][0]
                if job.produced >= job.output:
                    engine.jobs.remove(job)
                    left -= 1
                    if job.output > 1:
                        decoding_s = now_s - requests[index][0] - ttft[index]
                        tpot.append(decoding_s / (job.output - 1))
    return ttft, tpot


def workload(
    pairs: list[Pair], rate_rps: float, count: int, seed: int
) -> list[tuple[float, int, int]]:
    """Bursty (gamma, shape 0.5) arrivals of randomly drawn lengths."""
    rng = random.Random(seed)
    now_s, requests = 0.0, []
    for _ in range(count):
        now_s += rng.gammavariate(0.5, 2.0 / rate_rps)
        tokens, output = rng.choice(pairs)
        requests.append((now_s, tokens, output))
    return requests


def capacity_rps(pairs: list[Pair]) -> float:
    """Requests per second that FCFS completes when all of them are there at once."""
    rng = random.Random(8999)
    closed = [(0.0, *rng.choice(pairs)) for _ in range(600)]
    ttft, _ = simulate(closed, Arm(lambda: ORDERINGS.build("fcfs")))
    return len(closed) / max(ttft)


def measure(arm: Arm, pairs: list[Pair], rate_rps: float, count: int) -> list[float]:
    """Mean and P99 TTFT, and mean TPOT, averaged over the seeds."""
    sums = [0.0, 0.0, 0.0]
    for seed in TUNING_SEEDS:
        ttft, tpot = simulate(workload(pairs, rate_rps, count, seed), arm)
        ttft.sort()
        sums[0] += sum(ttft) / len(ttft)
        sums[1] += ttft[int(0.99 * len(ttft))]
        sums[2] += sum(tpot) / len(tpot)
    return [s / len(TUNING_SEEDS) for s in sums]


def arms(max_wait_s: float) -> dict[str, Arm]:
    """Baselines, the curve over the aging parameters, decode protection, static settings."""

    def aged(overtake: float, backlog: float) -> Callable[[], QueueOrdering]:
        return lambda: GimbalOrdering(GimbalOrderingOptions(overtake, backlog))

    found = {n: Arm(lambda n=n: ORDERINGS.build(n)) for n in ("fcfs", "sjf", "hrrn")}
    found["sjf, in batch"] = Arm(lambda: ORDERINGS.build("sjf"), in_batch=True)
    for overtake in (2.0, 5.0, 10.0, 20.0, 50.0):
        for backlog in (0.0, 1.0, 2.0, 4.0, 8.0, 16.0):
            name = f"gimbal F={overtake:g} B={backlog:g}"
            found[name] = Arm(aged(overtake, backlog), True, None, max_wait_s)
    found["gimbal F=10 B=4, waiting only"] = Arm(aged(10.0, 4.0), False, None, max_wait_s)
    for overtake in (5.0, 10.0, 20.0, 50.0):
        name = f"gimbal F={overtake:g} B=4, and dispatch"
        found[name] = Arm(aged(overtake, 4.0), True, None, max_wait_s, by_tokens=True)
    for tokens, factor, patience in ((512, 2.0, 8.0), (1024, 2.5, 8.0), (1024, 2.5, 4.0)):
        name = f"gimbal, and dispatch, {tokens}: {factor:g}x or 1/{patience:g}"
        found[name] = replace(
            found["gimbal F=10 B=4, and dispatch"],
            budget=tokens,
            tpot_factor=factor,
            patience_steps=patience,
        )
    both = found["gimbal F=10 B=4, and dispatch"]
    found |= {f"gimbal, and dispatch, {b}": replace(both, budget=b) for b in (256, 384, 768, 1024)}
    fcfs = found["fcfs"]
    found |= {f"static budget {b}": replace(fcfs, budget=b) for b in (128, 192, 256, 384, 1024)}
    found |= {f"static long prefill {t}": replace(fcfs, long_prefill=t) for t in (64, 128, 256)}
    found |= {f"static interval {n}": replace(fcfs, interval=n) for n in (2, 3, 4)}
    return found


def plot(path: Path, results: dict[tuple[str, float], dict[str, list[float]]]) -> None:
    """Mean against P99 TTFT relative to FCFS, one panel per trace and load."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(results), figsize=(5 * len(results), 4.5), squeeze=False)
    for axis, ((trace, load), rows) in zip(axes[0], results.items(), strict=True):
        fcfs = rows["fcfs"]
        for name, row in rows.items():
            colour = "tab:blue" if name.startswith("gimbal F") and "," not in name else "tab:red"
            axis.plot(row[0] / fcfs[0], row[1] / fcfs[1], "o", color=colour, markersize=4)
            if colour == "tab:red":
                axis.annotate(name, (row[0] / fcfs[0], row[1] / fcfs[1]), fontsize=6)
        axis.set(title=f"{trace}, load {load}", xlabel="mean TTFT / FCFS", ylabel="P99 TTFT / FCFS")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def keep(path: Path, rows: dict[str, list[float]]) -> None:
    """The arms in the form of `gimbal bench --json`, FCFS as `vllm`."""
    arms = {
        "vllm" if name == "fcfs" else name: {
            "ttft_ms": {"mean": mean * 1e3, "p99": p99 * 1e3},
            "tpot_ms": {"mean": tpot * 1e3},
        }
        for name, (mean, p99, tpot) in rows.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"arms": arms}), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trace", action="append", help="burstgpt, azure-conv (default: both)")
    parser.add_argument("--load", action="append", type=float, help="default 0.7, 0.9, 1.2")
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--max-wait-s", type=float, default=60.0)
    parser.add_argument("--only", default="", help="only arms whose name matches this, and fcfs")
    parser.add_argument("--step-ms", type=float, nargs=3, metavar=("BASE", "PREFILL", "DECODE"))
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", type=Path, help="folder for files that pareto.py reads")
    options = parser.parse_args()
    STEP_MS[:] = options.step_ms or STEP_MS
    results: dict[tuple[str, float], dict[str, list[float]]] = {}
    for trace in options.trace or ["burstgpt", "azure-conv"]:
        pairs = lengths_of(trace)
        capacity = capacity_rps(pairs)
        for load in options.load or [0.7, 0.9, 1.2]:
            print(f"\n{trace}, load {load} of {capacity:.2f} requests/s")
            print(f"{'':58}{'mean TTFT':>16}{'P99 TTFT':>16}{'TPOT':>16}")
            rows = results[trace, load] = {}
            for name, arm in arms(options.max_wait_s).items():
                if name != "fcfs" and not re.search(options.only, name):
                    continue
                rows[name] = measure(arm, pairs, load * capacity, options.requests)
                cells = (
                    f"{v:9.3f}s {v / b:5.2f}" for v, b in zip(rows[name], rows["fcfs"], strict=True)
                )
                print(f"{name:58}" + "".join(cells), flush=True)
    if options.plot:
        plot(options.plot, results)
    if options.json:
        for (trace, load), rows in results.items():
            keep(options.json / f"{trace}-{load}.json", rows)


def lengths_of(trace: str) -> list[Pair]:
    """(prompt, output) tokens of a built-in trace, cut as in the live test bed."""
    return [
        (min(MAX_PROMPT, max(1, r.prompt_tokens)), min(MAX_OUTPUT, max(1, r.output_tokens)))
        for r in load_trace(trace).requests
    ]


if __name__ == "__main__":
    main()
