"""One simulated comparison: arms over the same requests, and the report of all of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gimbal.core.cost.profile import Profile
from gimbal.records.schema import RunInfo
from gimbal.records.store import RunWriter
from gimbal.report.arms import Arm
from gimbal.report.metrics import Slo
from gimbal.report.simulated import report_of
from gimbal.sim.capacity import capacity_rps
from gimbal.sim.cells import POPULATION_SEED, Cell, CellResult, run_cells
from gimbal.sim.cluster import Cluster, load_cluster
from gimbal.sim.policies import policies_of, with_flags
from gimbal.sim.routing import Population, named_population
from gimbal.workloads import Trace, WorkloadOptions, build_workload


@dataclass(frozen=True, slots=True)
class ComparisonOptions:
    """What is simulated.

    Attributes:
        cluster: packaged name or file.
        trace: where requests come from.
        workload: what is taken from it; its rate is replaced when `load` is set.
        arms: the order of the report.
        repeats: runs of every arm, each with other requests.
        seed: of the first repeat; the next has the next one.
        load: fraction of the simulated capacity, or None for the workload's own rate.
        slo: what goodput counts.
    """

    cluster: str
    trace: Trace
    workload: WorkloadOptions
    arms: tuple[Arm, ...]
    repeats: int = 1
    seed: int = 0
    load: float | None = None
    slo: Slo = dataclasses.field(default_factory=Slo)

    @property
    def base(self) -> Arm:
        """The arm that capacity is measured on and ratios divide by: `vllm`, else the first."""
        return next((arm for arm in self.arms if arm.name == "vllm"), self.arms[0])


def run_comparison(
    options: ComparisonOptions,
    jobs: int | None = None,
    on_done: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[dict[str, Any], list[CellResult]]:
    """The report, and every run. The same options give the same report, byte for byte.

    Args:
        jobs: processes; None takes the CPUs this process may use.
        on_done: called with (finished, all) runs.

    Raises InputError before anything runs for what cannot be simulated.
    """
    cluster, profile = load_cluster(options.cluster)
    for arm in options.arms:
        policies_of(arm, with_flags(cluster, arm))
    population = named_population(cluster.routing, profile, POPULATION_SEED)
    workload, capacity = options.workload, None
    if options.load is not None:
        capacity = _capacity(options, cluster, profile, population)
        workload = dataclasses.replace(workload, rate_rps=options.load * capacity)
    cells = [
        Cell(
            options.cluster,
            build_workload(options.trace, workload, options.seed + repeat, population.names),
            arm,
            repeat,
            options.seed + repeat,
        )
        for repeat in range(options.repeats)
        for arm in options.arms
    ]
    on_done(0, len(cells))
    results = run_cells(cells, jobs, lambda done: on_done(done, len(cells)))
    names = [arm.name for arm in options.arms]
    report = report_of(results, names, options.base.name, options.slo, options.seed)
    report |= {
        "cluster": cluster.name,
        "load": options.load,
        "capacity_rps": capacity,
        "rate_rps": cells[0].trace.rate_rps,
    }
    return report, results


def _capacity(
    options: ComparisonOptions, cluster: Cluster, profile: Profile, population: Population
) -> float:
    sample = build_workload(options.trace, options.workload, options.seed, population.names)
    return capacity_rps(sample, cluster, profile, population, options.base, options.seed)


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
        rate = options.load * report["capacity_rps"]
        workload = dataclasses.replace(workload, rate_rps=rate)
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
