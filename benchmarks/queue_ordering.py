"""Which queue ordering, and which defaults: the queue level alone, in the simulator.

    python benchmarks/queue_ordering.py [--trace burstgpt] [--load 0.9] [--plot curve.png]

Compares first come first served, the baselines, the curve of Gimbal's ordering over its aging
parameters, the step's budget and vLLM's static settings on a cluster of `gimbal simulate`. Prints
mean and P99 TTFT and mean TPOT, each also relative to FCFS. The seeds are kept apart from those of
reported results. A tool for choosing defaults, not a result.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import fmean
from typing import Any

import click
import numpy as np

from gimbal.report.arms import Arm
from gimbal.sim.capacity import find_capacity
from gimbal.sim.cells import POPULATION_SEED, Cell, CellResult, run_cells
from gimbal.sim.cluster import load_cluster
from gimbal.sim.probes import Bed, replayed
from gimbal.sim.routing import named_population
from gimbal.workloads import Trace, WorkloadOptions, build_workload, load_trace

MAX_PROMPT, MAX_OUTPUT = 3000, 200
TUNING_SEEDS = range(9000, 9012)
BASE = "fcfs"
Row = tuple[float, float, float]
"""Mean TTFT, P99 TTFT and mean TPOT, seconds."""


def arm(name: str, *flags: str, dispatch: bool = False, **queue: Any) -> Arm:
    """Section `queue` as given, and Gimbal's dispatch where `dispatch` says so."""
    config = {"levels": ["dispatch", "queue"] if dispatch else ["queue"], "queue": queue}
    return Arm(name, config=config, flags=("--no-enable-eplb", *flags))


def aged(name: str, factor: float, backlog: float, *flags: str, **rest: Any) -> Arm:
    """Gimbal's ordering with these aging parameters."""
    options = {"overtake_factor": factor, "backlog_factor": backlog}
    return arm(name, *flags, options=options, **rest)


def arms() -> dict[str, Arm]:
    """Baselines, the curve over the aging parameters, budgets, static settings."""
    found = [arm(name, ordering=name) for name in (BASE, "sjf", "hrrn")]
    for factor in (2.0, 5.0, 10.0, 20.0, 50.0):
        for backlog in (0.0, 1.0, 2.0, 4.0, 8.0, 16.0):
            found.append(aged(f"gimbal F={factor:g} B={backlog:g}", factor, backlog))
    found.append(aged("gimbal F=10 B=4, waiting only", 10.0, 4.0, in_batch=False))
    for factor in (5.0, 10.0, 20.0, 50.0):
        found.append(aged(f"gimbal F={factor:g} B=4, and dispatch", factor, 4.0, dispatch=True))
    for budget in (512, 1024):
        name = f"gimbal, and dispatch, {budget}, full steps"
        found.append(arm(name, *_budget(budget), dispatch=True, step_budget=False))
    for budget in (256, 384, 768, 1024):
        name = f"gimbal, and dispatch, {budget}"
        found.append(arm(name, *_budget(budget), dispatch=True))
    for budget in (128, 192, 256, 384, 1024):
        found.append(arm(f"static budget {budget}", *_budget(budget), ordering=BASE))
    for flag, values in (
        ("--long-prefill-token-threshold", (64, 128, 256)),
        ("--prefill-schedule-interval", (2, 3, 4)),
    ):
        name = flag.strip("-").replace("-", " ")
        found += [arm(f"static {name} {n}", flag, str(n), ordering=BASE) for n in values]
    return {one.name: one for one in found}


def _budget(tokens: int) -> tuple[str, str]:
    return "--max-num-batched-tokens", str(tokens)


def workload(trace: Trace, rate_rps: float | None, requests: int, seed: int) -> Trace:
    """Bursty arrivals (gamma gaps) of the trace's requests, cut as in the live test bed."""
    options = WorkloadOptions(
        requests,
        arrivals="gamma",
        cv=2.0**0.5,
        rate_rps=rate_rps,
        max_prompt=MAX_PROMPT,
        max_output=MAX_OUTPUT,
    )
    return build_workload(trace, options, seed)


def capacity_of(cluster_name: str, trace: Trace) -> float:
    """Requests per second that FCFS can do."""
    cluster, profile = load_cluster(cluster_name)
    population = named_population(cluster.routing, profile, POPULATION_SEED)
    sample = workload(trace, None, 600, 8999)
    fcfs = arm(BASE, ordering=BASE)
    bed = Bed(cluster, profile, population, fcfs, 8999)
    return find_capacity(bed, replayed(sample), requests=1200).rate_rps


def row_of(results: list[CellResult]) -> Row:
    """The mean over the seeds."""
    rows = []
    for result in results:
        ttft = [r.first_token_s - r.arrival_s for r in result.records]
        tpot = [
            (r.last_token_s - r.first_token_s) / (r.output_tokens - 1)
            for r in result.records
            if r.output_tokens > 1
        ]
        rows.append((fmean(ttft), float(np.quantile(ttft, 0.99)), fmean(tpot)))
    mean, p99, tpot_s = (fmean(column) for column in zip(*rows, strict=True))
    return mean, p99, tpot_s


def plot(path: Path, results: dict[tuple[str, float], dict[str, Row]]) -> None:
    """Mean against P99 TTFT relative to FCFS, one panel per trace and load."""
    from gimbal.report.plots import pyplot

    plt = pyplot()
    figure, axes = plt.subplots(1, len(results), figsize=(5 * len(results), 4.5), squeeze=False)
    for axis, ((trace, load), rows) in zip(axes[0], results.items(), strict=True):
        fcfs = rows[BASE]
        for name, row in rows.items():
            ours = name.startswith("gimbal F") and "," not in name
            place = row[0] / fcfs[0], row[1] / fcfs[1]
            axis.plot(*place, "o", color="tab:blue" if ours else "tab:red", markersize=4)
            if not ours:
                axis.annotate(name, place, fontsize=6)
        axis.set(title=f"{trace}, load {load}", xlabel="mean TTFT / FCFS", ylabel="P99 TTFT / FCFS")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def keep(path: Path, rows: dict[str, Row]) -> None:
    """The arms in the form of `gimbal bench --json`, FCFS as `vllm`."""
    found = {
        "vllm" if name == BASE else name: {
            "ttft_ms": {"mean": mean * 1e3, "p99": p99 * 1e3},
            "tpot_ms": {"mean": tpot * 1e3},
        }
        for name, (mean, p99, tpot) in rows.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"arms": found}), encoding="utf-8")


@click.command()
@click.option("--trace", "traces", multiple=True, default=("burstgpt", "azure-conv"))
@click.option("--load", "loads", type=float, multiple=True, default=(0.7, 0.9, 1.2))
@click.option("--cluster", default="cpu-demo", show_default=True)
@click.option("--requests", default=300, show_default=True)
@click.option("--only", default="", help="only arms whose name matches this, and fcfs")
@click.option("--jobs", type=int, help="processes (default: all CPUs)")
@click.option("--plot", "picture", type=click.Path(path_type=Path))
@click.option("--json", "folder", type=click.Path(path_type=Path), help="files for pareto.py")
def main(
    traces: tuple[str, ...],
    loads: tuple[float, ...],
    cluster: str,
    requests: int,
    only: str,
    jobs: int | None,
    picture: Path | None,
    folder: Path | None,
) -> None:
    """Compares queue orderings in the simulator."""
    chosen = [one for one in arms().values() if one.name == BASE or re.search(only, one.name)]
    results: dict[tuple[str, float], dict[str, Row]] = {}
    for name in traces:
        trace = load_trace(name)
        capacity = capacity_of(cluster, trace)
        for load in loads:
            runs = [workload(trace, load * capacity, requests, seed) for seed in TUNING_SEEDS]
            cells = [Cell(cluster, t, one, n, n) for one in chosen for n, t in enumerate(runs)]
            done = run_cells(cells, jobs)
            rows = {one.name: row_of([r for r in done if r.arm == one.name]) for one in chosen}
            results[name, load] = rows
            print(f"\n{name}, load {load} of {capacity:.2f} requests/s")
            print(f"{'':58}{'mean TTFT':>16}{'P99 TTFT':>16}{'TPOT':>16}")
            for label, row in rows.items():
                pairs = zip(row, rows[BASE], strict=True)
                print(f"{label:58}" + "".join(f"{v:9.3f}s {v / b:5.2f}" for v, b in pairs))
            if folder:
                keep(folder / f"{name}-{load}.json", rows)
    if picture:
        plot(picture, results)


if __name__ == "__main__":
    main()
