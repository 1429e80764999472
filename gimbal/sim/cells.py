"""A matrix of simulated runs: one cell is one arm on one seed's workload, in its own process."""

from __future__ import annotations

import multiprocessing
import os
import threading
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing import connection
from multiprocessing.context import SpawnProcess
from typing import Any, TypeAlias, TypeVar, cast

import numpy as np

from gimbal.core.contracts import FloatArray
from gimbal.core.interrupts import shielded
from gimbal.records.schema import PlacementRecord, RebalanceRecord, RequestRecord
from gimbal.report.arms import Arm
from gimbal.report.metrics import statistics
from gimbal.report.window import Window
from gimbal.sim.cluster import Cluster, load_cluster
from gimbal.sim.routing import named_population
from gimbal.sim.run import SimResult, Simulation
from gimbal.workloads import Trace

Task = TypeVar("Task")
Result = TypeVar("Result")
PipeEnd: TypeAlias = "connection.Connection[Any, Any]"

POPULATION_SEED = 7
"""Who prefers which expert belongs to the model, not to a run: one seed for all cells."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One run to simulate; with a window only that part of it is measured."""

    cluster: str | Cluster
    trace: Trace
    arm: Arm
    repeat: int
    seed: int
    window: Window | None = None


@dataclass(frozen=True, slots=True)
class CellResult:
    """What a report needs of one run.

    Attributes:
        itl_ms: mean, P50, P90, P99 over all token gaps, from step times and decode counts.
        requests_by_engine, tokens_by_engine: by DP rank of the engines that answer.
        steps, preemptions: of the measured part.
        prefill_ms, kv_wait_ms: with prefill apart, statistics of the measured requests: see
            `SimResult`.
    """

    arm: str
    repeat: int
    records: tuple[RequestRecord, ...]
    rebalances: tuple[RebalanceRecord, ...]
    placements: tuple[PlacementRecord, ...]
    itl_ms: dict[str, float | None]
    requests_by_engine: dict[int, float]
    tokens_by_engine: dict[int, float]
    steps: int
    duration_s: float
    preemptions: int
    balance: float
    prefill_ms: dict[str, float | None] | None = None
    kv_wait_ms: dict[str, float | None] | None = None


def simulated(cell: Cell) -> SimResult:
    """Simulates one cell; the same cell gives the same result, byte for byte."""
    cluster, profile = load_cluster(cell.cluster)
    population = named_population(cluster.routing, profile, POPULATION_SEED)
    simulation = Simulation(cell.trace, cluster, profile, population, cell.arm, cell.seed)
    return simulation.run(cell.window)


def run_cell(cell: Cell) -> CellResult:
    """What a report needs of `cell`'s run."""
    cluster, _ = load_cluster(cell.cluster)
    return cell_result(simulated(cell), cell.arm.name, cell.repeat, cluster.dp, cell.window)


def cell_result(
    result: SimResult, arm: str, repeat: int, engines: int, window: Window | None = None
) -> CellResult:
    """What a report needs of `result`, its records marked with `repeat`."""
    records = tuple(
        RequestRecord(
            **{
                name: getattr(record, name)
                for name in RequestRecord.__dataclass_fields__
                if name != "repeat"
            },
            repeat=repeat,
        )
        for record in result.records
    )
    measured = window or Window(0.0, np.inf)
    ends = np.searchsorted(result.step_end_s, (measured.begin_s, measured.end_s))
    steps = slice(*ends.tolist())
    requests, tokens = np.zeros(engines), np.zeros(engines)
    arrived = measured.arrived(records)
    for record in arrived:
        assert record.engine is not None
        requests[record.engine] += 1
        tokens[record.engine] += record.prompt_tokens + record.output_tokens
    return CellResult(
        arm,
        repeat,
        records,
        tuple(replace(r, arm=arm, repeat=repeat) for r in result.rebalances),
        tuple(replace(p, arm=arm, repeat=repeat) for p in result.placements),
        gaps_ms(result.step_us[steps], result.step_decodes[steps]),
        dict(enumerate(requests.tolist())),
        dict(enumerate(tokens.tolist())),
        len(result.step_us[steps]),
        result.duration_s,
        int(result.step_preemptions[steps].sum()),
        result.balance,
        *_handover_ms(result, {record.index for record in arrived}),
    )


def _handover_ms(result: SimResult, measured: Collection[int]) -> list[dict[str, float | None]]:
    """Statistics of the two phases before a decode engine has a request; none without them.

    Args:
        measured: indices of the requests that count.
    """
    if not len(result.prefill_s):
        return []
    kept = [record.index in measured for record in result.records]
    return [statistics(1e3 * phase[kept]) for phase in (result.prefill_s, result.kv_wait_s)]


def gaps_ms(step_us: FloatArray, decodes: FloatArray) -> dict[str, float | None]:
    """Inter-token statistics: a step of d decoding requests is d gaps of its own duration."""
    total = decodes.sum()
    if total == 0:
        return dict.fromkeys(("mean", "p50", "p90", "p99"))
    order = np.argsort(step_us, kind="stable")
    reached = np.cumsum(decodes[order]) / total
    values = step_us[order] / 1e3
    result: dict[str, float | None] = {"mean": float(step_us @ decodes / total / 1e3)}
    for name, q in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99)):
        result[name] = float(values[min(int(np.searchsorted(reached, q)), len(values) - 1)])
    return result


def run_cells(
    cells: Sequence[Cell], jobs: int | None = None, on_done: Callable[[int], None] | None = None
) -> list[CellResult]:
    """All cells, in parallel over processes; results in the order of `cells`.

    Args:
        jobs: processes; None takes the CPUs this process may use, 1 runs here.
        on_done: called with the number of cells finished.
    """
    jobs = min(jobs or len(os.sched_getaffinity(0)), len(cells))
    results: dict[int, CellResult] = {}
    for index, result in completed(run_cell, cells, jobs):
        results[index] = result
        if on_done is not None:
            on_done(len(results))
    return [results[i] for i in range(len(cells))]


def _end_with_parent() -> None:
    """Ends this process when the one that started it is gone: a killed run leaves no workers."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _work(function: Callable[[Task], Result], pipe: PipeEnd) -> None:
    """Answers each task that comes with its result, or with what it raised, until it is ended."""
    _end_with_parent()
    while True:
        task = pipe.recv()
        try:
            pipe.send((function(task), None))
        except Exception as error:
            error.add_note("".join(traceback.format_tb(error.__traceback__)))
            pipe.send((None, error))


def completed(
    function: Callable[[Task], Result], tasks: Sequence[Task], jobs: int
) -> Iterator[tuple[int, Result]]:
    """Yields (index, result) of each task as it ends; the order is that of ending.

    Args:
        function: importable by name, because tasks run in spawned processes when `jobs` > 1.

    Closed early or interrupted, it starts no further task and ends those that run. What a task
    raises is raised here; RuntimeError says that a process has ended, killed for its memory say.
    """
    if jobs <= 1:
        for index, task in enumerate(tasks):
            yield index, function(task)
        return
    # Spawned, not forked: numba's and numpy's threads do not survive a fork. A pipe for each, not
    # the one of a ProcessPoolExecutor: a process that ends amid its answer ends its pipe as well,
    # where the executor's thread would wait for the rest for good.
    context = multiprocessing.get_context("spawn")
    waiting = iter(enumerate(tasks))
    working: dict[PipeEnd, int] = {}
    workers: dict[PipeEnd, SpawnProcess] = {}

    def hand_on(pipe: PipeEnd) -> None:
        index, task = next(waiting, (None, None))
        if index is None:
            return
        with suppress(ConnectionError):  # its end is said where its answer is read
            pipe.send(task)
        working[pipe] = index

    try:
        with shielded():
            for _ in range(min(jobs, len(tasks))):
                ours, theirs = context.Pipe()
                worker = context.Process(target=_work, args=(function, theirs))
                worker.start()
                workers[ours] = worker
                theirs.close()
        for pipe in workers:  # not before all have begun to start: a large task waits for its own
            hand_on(pipe)
        while working:
            for pipe in cast(list[PipeEnd], connection.wait(list(working))):
                index = working.pop(pipe)
                try:
                    result, error = pipe.recv()
                except (EOFError, OSError):  # the latter amid an answer
                    raise RuntimeError(f"the process that ran task {index} has ended") from None
                if error is not None:
                    raise error
                hand_on(pipe)
                yield index, result
    finally:
        for own in workers.values():
            own.terminate()
        for own in workers.values():
            own.join()
