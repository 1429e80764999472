"""The paper's evaluation as a matrix of simulated cells, each kept in a file of its own.

A cell is one arm on one seed's workload of one length distribution at one load of one scenario.
Its file is named after a digest of everything that defines it, so an interrupted run continues
where it stopped and a changed definition runs only its own cells again.

Arms mean what they mean everywhere (`gimbal.report.arms`). Since 0.2 those without level
`placement` run under vLLM's EPLB, as on a server: of ours `gimbal-dp`, whose experts stayed where
they start until then.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from gimbal.records.schema import PlacementRecord, RebalanceRecord, RequestRecord
from gimbal.report.arms import get_arm
from gimbal.sim.capacity import arm_definition, find_capacity
from gimbal.sim.cells import POPULATION_SEED, CellResult, cell_result, completed
from gimbal.sim.probes import Bed
from gimbal.sim.routing import make_population
from gimbal.sim.run import SimResult, Simulation
from gimbal.workloads import Trace, build_workload, load_trace
from gimbal.workloads.distributions import DISTRIBUTIONS
from reproduction.kept import digest, kept
from reproduction.scenarios import SCENARIOS, built

FORMAT = 3
"""Of a cell's file; raise it when what is measured changes."""
ARMS = (
    "vllm-legacy",
    "vllm",
    "gimbal-dp",
    "gimbal-ep",
    "gimbal-no-feedback",
    "gimbal",
    "moe-tuner",
    "sem-moe",
)
CAPACITY_ARM = "vllm"
TUNING_SEED = 90_000
"""Capacities are measured, and everything was tuned, on seeds from here on."""
FIRST_SEED = 3000
"""Reported seeds are FIRST_SEED, FIRST_SEED + 1, ...; seeds below have been looked at."""
KEPT_LOAD, KEPT_DISTRIBUTION = 0.9, "random"
"""Cells whose requests are kept one by one, for ``gimbal report``."""


@dataclass(frozen=True, slots=True)
class Matrix:
    """What is run."""

    scenarios: tuple[str, ...] = tuple(SCENARIOS)
    distributions: tuple[str, ...] = DISTRIBUTIONS
    loads: tuple[float, ...] = (0.3, 0.5, 0.7, 0.8, 0.9, 1.0, 1.2)
    arms: tuple[str, ...] = ARMS
    seeds: int = 8
    requests: int = 3000
    trace: str = "burstgpt"
    capacity_requests: int = 1000


QUICK = Matrix(loads=(0.3, 0.9, 1.2), seeds=4, requests=1200, capacity_requests=300)


@dataclass(frozen=True, slots=True)
class Task:
    """One cell, or with `arm` empty the capacity of a scenario and distribution."""

    directory: str
    trace: str
    scenario: str
    distribution: str
    requests: int
    arm: str = ""
    load: float = 0.0
    seed: int = TUNING_SEED
    capacity_rps: float = 0.0

    @property
    def kept(self) -> bool:
        return self.load == KEPT_LOAD and self.distribution == KEPT_DISTRIBUTION

    def definition(self) -> dict[str, Any]:
        """Everything the result depends on, but for the code."""
        cluster, profile = built(self.scenario)
        options = SCENARIOS[self.scenario].options(self.distribution, self.requests, None)
        values = dataclasses.asdict(self)
        del values["directory"], values["scenario"]
        arm = arm_definition(get_arm(self.arm)) if self.arm else {}
        return {
            **values,
            "format": FORMAT,
            "arm": arm,
            "cluster": dataclasses.asdict(cluster),
            "profile": dataclasses.asdict(profile),
            "workload": dataclasses.asdict(options),
            "population_seed": POPULATION_SEED,
            "rows": _trace_digest(self.trace),
        }

    @property
    def path(self) -> Path:
        """Where the result is kept."""
        kind, own = self.arm or "capacity", digest(self.definition())
        name = f"{self.scenario}-{self.distribution}-{kind}-{self.load:g}-{self.seed}-{own}.json"
        return Path(self.directory) / "cells" / name


@lru_cache(maxsize=2)
def _trace(name: str) -> Trace:
    return load_trace(name)


@lru_cache(maxsize=2)
def _trace_digest(name: str) -> str:
    rows = [(r.arrival_s, r.prompt_tokens, r.output_tokens) for r in _trace(name).requests]
    return hashlib.sha256(np.array(rows).tobytes()).hexdigest()


def run_task(task: Task) -> dict[str, Any]:
    """Runs one task and keeps its result; a kept one is read back instead."""
    return kept(task.path, lambda: _cell(task) if task.arm else _capacity(task))


def _workload(task: Task, rate_rps: float | None, domains: tuple[str, ...]) -> Trace:
    options = SCENARIOS[task.scenario].options(task.distribution, task.requests, rate_rps)
    return build_workload(_trace(task.trace), options, task.seed, domains)


def _capacity(task: Task) -> dict[str, Any]:
    cluster, profile = built(task.scenario)
    population = make_population(profile, seed=POPULATION_SEED)
    bed = Bed(cluster, profile, population, get_arm(CAPACITY_ARM), task.seed)

    def traffic(rate_rps: float | None, count: int) -> Trace:
        return _workload(dataclasses.replace(task, requests=count), rate_rps, population.names)

    return {"capacity_rps": find_capacity(bed, traffic, requests=task.requests).rate_rps}


def _cell(task: Task) -> dict[str, Any]:
    cluster, profile = built(task.scenario)
    population = make_population(profile, seed=POPULATION_SEED)
    trace = _workload(task, task.load * task.capacity_rps, population.names)
    run = Simulation(trace, cluster, profile, population, get_arm(task.arm), task.seed).run()
    result = summary(run)
    if task.kept:
        kept = cell_result(run, task.arm, task.seed - FIRST_SEED, cluster.dp)
        result["run"] = dataclasses.asdict(kept)
    return result


def kept_run(result: dict[str, Any]) -> CellResult:
    """The run of a kept cell, from its file."""
    values = dict(result["run"])
    values["records"] = tuple(RequestRecord(**row) for row in values["records"])
    values["rebalances"] = tuple(RebalanceRecord(**row) for row in values["rebalances"])
    values["placements"] = tuple(PlacementRecord(**row) for row in values["placements"])
    for name in ("requests_by_engine", "tokens_by_engine"):
        values[name] = {int(engine): count for engine, count in values[name].items()}
    return CellResult(**values)


def summary(run: SimResult) -> dict[str, Any]:
    """The figures of one run that the tables need; latencies in milliseconds."""
    first = np.array([r.first_token_s for r in run.records])
    last = np.array([r.last_token_s for r in run.records])
    sent = np.array([r.sent_s for r in run.records])
    tokens = np.array([r.output_tokens for r in run.records])
    ttft, many = (first - sent) * 1e3, tokens > 1
    tpot = (last - first)[many] / (tokens[many] - 1) * 1e3
    realized = [r.realized_gain_us_per_step for r in run.rebalances]
    return {
        "ttft_mean_ms": float(ttft.mean()),
        "ttft_p50_ms": float(np.percentile(ttft, 50)),
        "ttft_p99_ms": float(np.percentile(ttft, 99)),
        "tpot_mean_ms": float(tpot.mean()) if len(tpot) else None,
        "throughput_rps": len(first) / float(last.max() - sent.min()),
        "completed": len(first),
        "steps": run.steps,
        "preemptions": run.preemptions,
        "expert_balance": run.balance,
        "rearrangements": sum(r.committed for r in run.rebalances),
        "refused": sum(not r.committed for r in run.rebalances),
        "stall_s": sum(r.stall_us or 0.0 for r in run.rebalances if r.committed) / 1e6,
        "predicted_gain_us": [r.predicted_gain_us_per_step for r in run.rebalances],
        "realized_gain_us": realized,
    }


def tasks_of(matrix: Matrix, directory: Path, capacity: dict[tuple[str, str], float]) -> list[Task]:
    """All cells, seed by seed, so that a stopped run holds whole comparisons."""
    return [
        Task(
            str(directory),
            matrix.trace,
            scenario,
            distribution,
            matrix.requests,
            arm,
            load,
            FIRST_SEED + seed,
            capacity[scenario, distribution],
        )
        for seed in range(matrix.seeds)
        for scenario in matrix.scenarios
        for distribution in matrix.distributions
        for load in matrix.loads
        for arm in (*matrix.arms, *SCENARIOS[scenario].more_arms)
    ]


def capacity_tasks(matrix: Matrix, directory: Path) -> list[Task]:
    """One per scenario and distribution."""
    requests = matrix.capacity_requests
    return [
        Task(str(directory), matrix.trace, scenario, distribution, requests)
        for scenario in matrix.scenarios
        for distribution in matrix.distributions
    ]


def run_matrix(
    matrix: Matrix,
    directory: Path,
    jobs: int,
    on_done: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[tuple[Task, dict[str, Any]]]:
    """Runs what is missing; yields every task with its result, capacities first.

    Args:
        on_done: called with (finished, all), kept results included.
    """
    first = capacity_tasks(matrix, directory)
    extra = sum(len(SCENARIOS[name].more_arms) for name in matrix.scenarios)
    arms = len(matrix.arms) * len(matrix.scenarios) + extra
    total = len(first) + arms * len(matrix.distributions) * len(matrix.loads) * matrix.seeds
    done = 0
    capacity = {}
    for task, result in _run(first, jobs):
        capacity[task.scenario, task.distribution] = result["capacity_rps"]
        done += 1
        on_done(done, total)
        yield task, result
    for task, result in _run(tasks_of(matrix, directory, capacity), jobs):
        done += 1
        on_done(done, total)
        yield task, result


def _run(tasks: Sequence[Task], jobs: int) -> Iterator[tuple[Task, dict[str, Any]]]:
    missing = []
    for task in tasks:
        if task.path.exists():
            yield task, run_task(task)
        else:
            missing.append(task)
    for index, result in completed(run_task, missing, min(jobs, len(missing))):
        yield missing[index], result
