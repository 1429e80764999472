"""Regimes in which users lose most, simulated in steady state, each cell kept in a file.

A cell is one arm on one seed's requests at one load of one regime, as `gimbal simulate` runs it
(`gimbal.sim.comparison`). Its file is named after a digest of everything that defines it but the
code, so that a stopped run goes on where it stopped. So are capacities.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gimbal.core.errors import InputError
from gimbal.core.files import structured
from gimbal.core.json_text import read_object
from gimbal.records.schema import RequestRecord
from gimbal.report.arms import get_arm
from gimbal.report.window import Window
from gimbal.sim.capacity import Capacity, arm_definition, capacity_definition, rows_digest
from gimbal.sim.cells import POPULATION_SEED, Cell, CellResult, completed, run_cell
from gimbal.sim.cluster import Cluster, load_cluster
from gimbal.sim.comparison import ComparisonOptions, bed_of, capacity_of, cells_of
from gimbal.sim.probes import Bed
from gimbal.workloads import WorkloadOptions, load_trace
from reproduction.kept import digest, kept

FORMAT = 1
"""Of a cell's file; raise it when what is measured changes."""
BASE, OURS, IDEAL = "vllm", "gimbal-dp", "ideal-pool"
PEERS = ("lmetric", "llm-d", "dynamo")
ARMS = (BASE, OURS, *PEERS, IDEAL)
FIRST_SEED = 11
"""Seeds below have been tuned on."""


@dataclass(frozen=True, slots=True)
class Regime:
    """Attributes:
    trace: scenario, or built-in trace that has to be downloaded.
    cluster: packaged.
    kv_share: of the KV memory that the cluster's engines have.
    requests: measured ones of a run; None as `ComparisonOptions` says.
    """

    name: str
    trace: str
    cluster: str
    kv_share: float = 1.0
    requests: int | None = None

    def build(self) -> Cluster:
        """The cluster with that share of its memory."""
        cluster, profile = load_cluster(self.cluster)
        if self.kv_share == 1.0:
            return cluster
        tokens = int(self.kv_share * (cluster.kv_tokens or profile.kv_tokens))
        name = f"{cluster.name} with {self.kv_share:.0%} of its KV memory"
        return dataclasses.replace(cluster, name=name, kv_tokens=tokens)


REGIMES = {
    regime.name: regime
    for regime in (
        Regime("chat", "chat", "h100x8-dp8", requests=1500),
        Regime("mooncake", "mooncake", "h100x8-dp8", requests=1500),
        Regime("agent", "agent", "h100x8-dp8", requests=1500),
        Regime("reasoning", "reasoning", "h100x8-dp8", kv_share=0.2, requests=1500),
        Regime("burst", "burst", "h100x4-paper"),
        Regime("azure", "azure-conv", "h100x8-dp8"),
        Regime("pd", "chat", "h100x8-pd-4p4d", requests=1500),
    )
}


@dataclass(frozen=True, slots=True)
class Plan:
    """What is run.

    Attributes:
        loads: shares of the regime's capacity.
        seeds: how many, from `first_seed` on.
        requests: measured ones of a run; None as each regime says.
    """

    regimes: tuple[Regime, ...] = tuple(REGIMES.values())
    loads: tuple[float, ...] = (0.7, 0.9)
    seeds: int = 5
    first_seed: int = FIRST_SEED
    requests: int | None = None


@dataclass(frozen=True, slots=True)
class Group:
    """All runs of one regime at one load.

    Attributes:
        code: versions of the code they come from.
    """

    regime: Regime
    load: float
    capacity_rps: float
    rate_rps: float
    cluster: str
    window: Window | None
    results: list[CellResult]
    code: tuple[str, ...]


def available(plan: Plan, say: Callable[[str], None]) -> Plan:
    """`plan` without the regimes whose traces are not here; `say` is told of each."""
    found = []
    for regime in plan.regimes:
        try:
            load_trace(regime.trace)
        except InputError as error:
            say(f"{regime.name}: left out: {error}")
        else:
            found.append(regime)
    return dataclasses.replace(plan, regimes=tuple(found))


def run_regimes(
    plan: Plan,
    directory: Path,
    jobs: int,
    on_done: Callable[[int, int], None] = lambda done, total: None,
    say: Callable[[str], None] = lambda text: None,
    run: bool = True,
) -> Iterator[Group]:
    """Runs what is missing; yields every regime's groups, by load.

    Args:
        jobs: processes.
        on_done: called with (finished, all) cells, those kept included.
        say: gets a few words about what is done before the cells.
        run: False leaves out loads of which a cell is missing.

    Raises InputError for what cannot be simulated.
    """
    done, each = 0, plan.seeds * len(ARMS)
    total = len(plan.regimes) * len(plan.loads) * each
    for regime in plan.regimes:
        options = options_of(regime, plan)
        bed = bed_of(options)
        capacity = kept_capacity(regime, options, bed, directory, say, run)
        for load in plan.loads:
            own = dataclasses.replace(options, load=load)
            cells = cells_of(own, bed, capacity, say)
            tasks = cell_files(regime, load, cells, directory)
            missing = [task for task in tasks if not task[0].exists()]
            if missing and not run:
                continue
            for finished, _ in enumerate(completed(keep_cell, missing, min(jobs, len(missing)))):
                on_done(done + each - len(missing) + finished + 1, total)
            done += each
            on_done(done, total)
            found = [read_cell(path) for path, _ in tasks]
            results, code = [result for result, _ in found], {version for _, version in found}
            rate, window = cells[0].trace.rate_rps, cells[0].window
            name = bed.cluster.name
            yield Group(
                regime, load, capacity.rate_rps, rate, name, window, results, tuple(sorted(code))
            )


def options_of(regime: Regime, plan: Plan) -> ComparisonOptions:
    """All arms' runs of `plan` in `regime`, without a load."""
    return ComparisonOptions(
        cluster=regime.build(),
        trace=load_trace(regime.trace),
        workload=WorkloadOptions(requests=plan.requests or regime.requests),
        arms=tuple(map(get_arm, ARMS)),
        repeats=plan.seeds,
        seed=plan.first_seed,
    )


def kept_capacity(
    regime: Regime,
    options: ComparisonOptions,
    bed: Bed,
    directory: Path,
    say: Callable[[str], None],
    run: bool = True,
) -> Capacity:
    """That of `BASE`, kept: with other code it stays what the cells were run at.

    Raises InputError where it is not there and `run` is False.
    """
    name = digest(capacity_definition(bed, options.trace, options.workload))
    path = directory / "cells" / f"{regime.name}-capacity-{name}.json"
    if not (run or path.exists()):
        raise InputError(f"--kept: nothing of {regime.name} is finished in {directory}")

    def search() -> dict[str, Any]:
        return dataclasses.asdict(capacity_of(options, bed, lambda text: say(_of(regime, text))))

    values = kept(path, search)
    with structured(path):
        stays = tuple([(float(rate), float(stay)) for rate, stay in values["stays"]])
        return Capacity(float(values["rate_rps"]), stays)


def _of(regime: Regime, text: str) -> str:
    return f"{regime.name}: {text}"


def cell_files(
    regime: Regime, load: float, cells: Sequence[Cell], directory: Path
) -> list[tuple[Path, Cell]]:
    """Every cell and its file."""
    rows: dict[int, str] = {}  # all arms of a repeat share its requests
    tasks = []
    for cell in cells:
        if cell.repeat not in rows:
            rows[cell.repeat] = rows_digest(cell.trace)
        own = digest(_definition(cell, rows[cell.repeat]))
        name = f"{regime.name}-{load:g}-{cell.arm.name}-{cell.seed}-{own}.json"
        tasks.append((directory / "cells" / name, cell))
    return tasks


def _definition(cell: Cell, rows: str) -> dict[str, Any]:
    """Everything that a cell's result depends on, but for the code."""
    cluster, profile = load_cluster(cell.cluster)
    return {
        "format": FORMAT,
        "cluster": dataclasses.asdict(cluster),
        "profile": dataclasses.asdict(profile),
        "arm": arm_definition(cell.arm),
        "seed": cell.seed,
        "window": None if cell.window is None else cell.window.to_json(),
        "population_seed": POPULATION_SEED,
        "block": cell.trace.prefix_block_tokens,
        "rows": rows,
    }


_COLUMNS = (
    "index",
    "arrival_s",
    "sent_s",
    "first_token_s",
    "last_token_s",
    "prompt_tokens",
    "output_tokens",
    "expected_output_tokens",
    "engine",
    "status",
)
"""What is kept of the requests."""


def keep_cell(task: tuple[Path, Cell]) -> None:
    """Runs a cell and keeps its result."""
    path, cell = task
    kept(path, lambda: _to_json(run_cell(cell)))


def _to_json(result: CellResult) -> dict[str, Any]:
    small = dataclasses.replace(result, records=(), rebalances=(), placements=())
    columns = {name: [getattr(r, name) for r in result.records] for name in _COLUMNS}
    return dataclasses.asdict(small) | {"records": columns}


def read_cell(path: Path) -> tuple[CellResult, str]:
    """A kept result, and the version of the code it comes from."""
    values = read_object(path)
    with structured(path):
        code, arm, repeat = str(values.pop("code")), values["arm"], values["repeat"]
        rows = zip(*(values["records"][name] for name in _COLUMNS), strict=True)
        records = [
            RequestRecord(f"r{row[0]}", arm, repeat, **dict(zip(_COLUMNS, row, strict=True)))
            for row in rows
        ]
        for name in ("requests_by_engine", "tokens_by_engine"):
            values[name] = {int(engine): count for engine, count in values[name].items()}
        result = CellResult(**values | {"records": tuple(records)})
    return result, code
