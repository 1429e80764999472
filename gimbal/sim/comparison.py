"""One simulated comparison: arms over the same requests, and the report of all of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gimbal.records.schema import RunInfo
from gimbal.records.store import RunWriter
from gimbal.report.arms import Arm
from gimbal.report.metrics import Slo
from gimbal.report.simulated import report_of
from gimbal.report.window import Window
from gimbal.sim.capacity import Capacity, known_capacity
from gimbal.sim.cells import POPULATION_SEED, Cell, CellResult, run_cells
from gimbal.sim.cluster import Cluster, described, load_cluster
from gimbal.sim.policies import policies_of, with_flags
from gimbal.sim.probes import Bed, Traffic, stay_s
from gimbal.sim.routing import named_population
from gimbal.workloads import Trace, WorkloadOptions, build_workload

LEAST_STAYS = 2.0
"""Length of what is measured, in P99s of the time that requests stay, if no count is asked for."""
AFTER_STAYS = 2.0
"""Arrivals after it, in the same; the run ends when all measured requests have."""


@dataclass(frozen=True, slots=True)
class ComparisonOptions:
    """What is simulated.

    Attributes:
        cluster: packaged name or file, or the cluster itself.
        trace: where requests come from.
        workload: what is taken from it; its rate is replaced when `load` is set.
        arms: the order of the report.
        repeats: runs of every arm, each with other requests.
        seed: of the first repeat; the next has the next one.
        load: fraction of the simulated capacity, or None for the workload's own rate.
        settle_s: arrivals before what is measured; None finds out how long requests stay, 0
            measures all requests, the run's beginning and end too.
        slo: what goodput counts.
    """

    cluster: str | Cluster
    trace: Trace
    workload: WorkloadOptions
    arms: tuple[Arm, ...]
    repeats: int = 1
    seed: int = 0
    load: float | None = None
    settle_s: float | None = None
    slo: Slo = dataclasses.field(default_factory=Slo)

    @property
    def base(self) -> Arm:
        """The arm that capacity is measured on and ratios divide by: `vllm`, else the first."""
        return next((arm for arm in self.arms if arm.name == "vllm"), self.arms[0])


def run_comparison(
    options: ComparisonOptions,
    jobs: int | None = None,
    on_done: Callable[[int, int], None] = lambda done, total: None,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[dict[str, Any], list[CellResult]]:
    """The report, and every run. The same options give the same report, byte for byte.

    Args:
        jobs: processes; None takes the CPUs this process may use.
        on_done: called with (finished, all) runs.
        say: gets a few words about what is done before the runs.

    Raises InputError before anything runs for what cannot be simulated.
    """
    bed = bed_of(options)
    capacity = None if options.load is None else capacity_of(options, bed, say)
    cells = cells_of(options, bed, capacity, say)
    on_done(0, len(cells))
    results = run_cells(cells, jobs, lambda done: on_done(done, len(cells)))
    names = [arm.name for arm in options.arms]
    base, slo = options.base.name, options.slo
    report = report_of(results, names, base, slo, options.seed, cells[0].window)
    report |= {
        "cluster": bed.cluster.name,
        "estimated": bed.profile.estimated,
        "load": options.load,
        "capacity_rps": None if capacity is None else capacity.rate_rps,
        "rate_rps": cells[0].trace.rate_rps,
        "notes": [*cells[0].trace.notes, *described(bed.cluster, bed.profile)],
    }
    return report, results


def bed_of(options: ComparisonOptions) -> Bed:
    """What the base arm runs on; raises InputError where any arm cannot run there."""
    cluster, profile = load_cluster(options.cluster)
    for arm in options.arms:
        policies_of(arm, with_flags(cluster, arm))
    population = named_population(cluster.routing, profile, POPULATION_SEED)
    return Bed(cluster, profile, population, options.base, options.seed)


def capacity_of(
    options: ComparisonOptions, bed: Bed, say: Callable[[str], None] = lambda text: None
) -> Capacity:
    """That of the base arm, for the requests that `options` ask for."""
    return known_capacity(bed, _traffic(options, bed), options.trace, options.workload, say)


def _at_load(workload: WorkloadOptions, load: float, capacity_rps: float) -> WorkloadOptions:
    """`workload` with requests that come at that share of the capacity."""
    return dataclasses.replace(workload, rate_rps=workload.before_scaling(load * capacity_rps))


def _traffic(options: ComparisonOptions, bed: Bed) -> Traffic:
    workload, names = options.workload, bed.population.names

    def traffic(rate_rps: float | None, count: int) -> Trace:
        own = workload.rate_rps if rate_rps is None else workload.before_scaling(rate_rps)
        sized = dataclasses.replace(workload, rate_rps=own, requests=count)
        return build_workload(options.trace, sized, options.seed, names)

    return traffic


def cells_of(
    options: ComparisonOptions,
    bed: Bed,
    capacity: Capacity | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> list[Cell]:
    """Every arm's runs, at the load of `capacity` if there is one, repeat by repeat."""
    workload, window = _plan(options, bed, capacity, say)
    names = bed.population.names
    return [
        Cell(options.cluster, trace, arm, repeat, options.seed + repeat, window)
        for repeat in range(options.repeats)
        for trace in [build_workload(options.trace, workload, options.seed + repeat, names)]
        for arm in options.arms
    ]


def _plan(
    options: ComparisonOptions, bed: Bed, capacity: Capacity | None, say: Callable[[str], None]
) -> tuple[WorkloadOptions, Window | None]:
    """What a run takes, and what of it is measured: requests as many as asked for, or else as many
    as the trace has and at least `LEAST_STAYS` times as long as they stay."""
    workload = options.workload
    if capacity is not None and options.load is not None:
        workload = _at_load(workload, options.load, capacity.rate_rps)
    traffic = _traffic(options, bed)
    count = workload.requests or len(options.trace)
    own = workload.rate_rps
    rate = own / workload.scale_time if own else traffic(None, count).rate_rps
    if options.settle_s == 0 or rate == 0:  # nothing can go on before requests without a rate
        return workload, None
    settle_s = options.settle_s
    if settle_s is None and capacity is not None:
        settle_s = capacity.stay_s(rate)
    if settle_s is None:
        say("how long requests stay")
        settle_s = stay_s(bed, traffic, rate, own=workload.rate_rps is None)
    span_s = count / rate
    if workload.requests is None:
        span_s = max(span_s, LEAST_STAYS * settle_s)
    window = Window(settle_s, settle_s + span_s)
    requests = math.ceil(rate * (window.end_s + AFTER_STAYS * settle_s)) + 1
    return dataclasses.replace(workload, requests=requests), window


def keep_run(
    directory: Path,
    options: ComparisonOptions,
    report: dict[str, Any],
    results: Sequence[CellResult],
    command: Sequence[str] = (),
) -> None:
    """Writes a run directory for `gimbal report`.

    Args:
        command: what was typed to get it.
    """
    workload = options.workload
    if options.load is not None:
        workload = _at_load(workload, options.load, report["capacity_rps"])
    info = RunInfo(
        kind="simulate",
        command=tuple(command),
        seed=options.seed,
        repeats=options.repeats,
        trace={"name": options.trace.name, "options": dataclasses.asdict(workload)},
        arms={arm.name: arm.to_json() for arm in options.arms},
        environment=report["environment"],
        slo=options.slo.limits(),
        result=report,
    )
    with RunWriter(directory, info) as writer:
        for result in results:
            writer.write(result.records)
            writer.write(result.rebalances)
            writer.write(result.placements)
