"""Expert placement against vLLM's default policy and other baselines: ``make bench-placement``.

Every row of the table plays `--windows` windows of the synthetic routing population (Zipf 0.8,
drift 0.97, source share 0.7 and 0.3): each placer plans on one window from its own placement and
is scored on the next. vLLM's default is the installed package's, called in turns with ours in one
process on one thread. CPU time is process CPU time, the least of `--repeat` calls, after compiling.
J is the dimensionless objective ``max/mean load - 1 + comm/2 + moved/20`` with distances 0, 1, 4
for same rank, same node, other node (comm relative to all pairs sent to another node).

With ESFT's recorded routing at hand ($GIMBAL_DATA or ../shared/data), four tasks become four
sources: first each engine serves one task, then sequences are dealt at random.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from rich.console import Console
from rich.table import Table

from gimbal.core.contracts import FloatArray, IntArray, RoutingCounts, Topology
from gimbal.core.placement import PLACERS, heuristic, objective
from gimbal.core.placement.problem import CostConstants, PlacementProblem
from gimbal.workloads.routing import count_choices
from gimbal.workloads.routing_populations import RoutingPopulation, windows

Plan = Callable[[FloatArray, Topology, IntArray], IntArray]
"""A placer as the benchmark sees it: counts, topology, current placement in; placement out."""

TASKS = ("intent", "summary", "law", "translation")


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    name: str
    layers: int
    experts: int
    ranks: int
    redundant: int = 0
    ranks_per_source: int = 1

    @property
    def topology(self) -> Topology:
        slots = self.experts + self.redundant
        return Topology(self.ranks, slots // self.ranks, self.ranks_per_source, 8)


CASES = (
    Case("48x128 R4", 48, 128, 4),
    Case("48x128 R4 +16", 48, 128, 4, 16),
    Case("48x128 TP2xDP2", 48, 128, 4, 0, 2),
    Case("58x256 R32 +32", 58, 256, 32, 32),
    Case("58x256 R64 +64", 58, 256, 64, 64),
    Case("58x256 R96 +32", 58, 256, 96, 32),
    Case("58x256 R256 +256", 58, 256, 256, 256),
    Case("58x256 R320 +64", 58, 256, 320, 64),
)


@dataclass(frozen=True)
class Score:
    """One planned window; `received` and `moved` are shares of all slots."""

    cpu_ms: float
    planned: float
    following: float
    received: float
    moved: float
    local: float
    cost: float  # J on the window planned for
    cost_next: float  # J on the next


def unit_costs(counts: FloatArray, topology: Topology) -> CostConstants:
    """Constants that turn the objective in microseconds into J + 1 per layer."""
    pairs = float(counts[:, 0].sum())  # every layer routes as many
    per_pair = topology.ranks / pairs
    return CostConstants(
        moe_fixed_us=0.0,
        us_per_active_expert=0.0,
        us_per_pair=per_pair,
        overlap_exponent=1.0,
        us_per_gathered_token=0.0,
        bytes_per_pair=0.5 * per_pair * 1e3 / 4.0,
        same_node_gbps=1.0,
        other_node_gbps=0.25,
        expert_bytes=0.05 / topology.slots * topology.ranks * 1e3,
        migration_gbps=1.0,
        migration_fixed_us=0.0,
    )


def j_cost(counts: FloatArray, topology: Topology, placement: IntArray, current: IntArray) -> float:
    """J of moving from `current` to `placement`, mean over layers."""
    costs = unit_costs(counts, topology)
    problem = PlacementProblem(RoutingCounts(counts), topology, current, costs, horizon_steps=1)
    return objective.evaluate(problem, placement).total / problem.layers - 1.0


def gimbal() -> Plan:
    """Gimbal's placer with its forecast; validation, forecast and search are all timed."""
    placer = heuristic.GimbalPlacer()

    def plan(counts: FloatArray, topology: Topology, current: IntArray) -> IntArray:
        costs = unit_costs(counts, topology)
        problem = PlacementProblem(RoutingCounts(counts), topology, current, costs, horizon_steps=1)
        return placer.plan(problem).physical_to_logical

    return plan


def gimbal_last_window() -> Plan:
    """The same search on the last window's counts, without the forecast."""

    def plan(counts: FloatArray, topology: Topology, current: IntArray) -> IntArray:
        costs = unit_costs(counts, topology)
        problem = PlacementProblem(RoutingCounts(counts), topology, current, costs, horizon_steps=1)
        return heuristic.plan(problem).physical_to_logical

    return plan


def vllm_default() -> Plan:
    """The installed vLLM's default policy; its input is summed over sources beforehand."""
    import torch
    from vllm.distributed.eplb.policy.default import DefaultEplbPolicy

    torch.set_num_threads(1)

    def plan(counts: FloatArray, topology: Topology, current: IntArray) -> IntArray:
        # vLLM all-reduces over ranks before it plans, so a source axis of 1 costs it nothing.
        total = torch.from_numpy(counts[0] if len(counts) == 1 else counts.sum(axis=0))
        old = torch.from_numpy(current)
        planned = DefaultEplbPolicy.rebalance_experts(
            total, topology.slots, 1, 1, topology.ranks, old
        )
        return planned.numpy().astype(np.int32)

    plan.summed = True
    return plan


def registered(name: str) -> Callable[[], Plan]:
    """A baseline of the registry."""

    def make() -> Plan:
        placer = PLACERS.build(name)
        return lambda counts, topology, current: placer.place(
            RoutingCounts(counts), topology, current
        )

    return make


def timed(make: Callable[[], Plan], history: list, topology: Topology, repeat: int) -> float:
    """Least CPU milliseconds of the last planned window, with the state that led up to it."""
    best = float("inf")
    for _ in range(repeat):
        plan = make()
        for counts, current in history[:-1]:
            plan(counts, topology, current)
        counts, current = history[-1]
        if hasattr(plan, "summed"):
            counts = counts.sum(axis=0, keepdims=True)
        start = time.process_time()
        plan(counts, topology, current)
        best = min(best, (time.process_time() - start) * 1e3)
    return best


def play(
    case: Case, makes: dict[str, Callable[[], Plan]], share: float, args: argparse.Namespace
) -> dict[str, Score]:
    """Scores every placer on the same windows; the first `args.skip` are warm-up."""
    topology = case.topology
    population = RoutingPopulation(
        case.layers,
        case.experts,
        topology.sources,
        source_share=share,
        drift_correlation=args.drift,
        seed=args.seed,
    )
    stream = windows(population)
    first = np.arange(topology.slots, dtype=np.int32) % case.experts
    current = {name: np.tile(first, (case.layers, 1)) for name in makes}
    plans = {name: make() for name, make in makes.items()}
    history: dict[str, list] = {name: [] for name in makes}
    scores: dict[str, list[Score]] = {name: [] for name in makes}
    counts = next(stream)
    for step in range(args.windows):
        following = next(stream)
        for name, plan in plans.items():
            placed = plan(counts, topology, current[name])
            history[name] = [*history[name], (counts, current[name])][-2:]
            if step >= args.skip:
                scores[name].append(score(counts, following, topology, placed, current[name]))
            current[name] = placed
        counts = following
    cpu = {name: float("inf") for name in makes}
    for _ in range(args.repeat):  # in turns
        for name, make in makes.items():
            cpu[name] = min(cpu[name], timed(make, history[name], topology, 1))
    return {name: replace(mean_score(rows), cpu_ms=cpu[name]) for name, rows in scores.items()}


def score(
    counts: FloatArray,
    following: FloatArray,
    topology: Topology,
    placed: IntArray,
    current: IntArray,
) -> Score:
    """What one plan did, on its own window and on the next."""
    return Score(
        cpu_ms=0.0,
        planned=objective.balance(placed, counts, topology),
        following=objective.balance(placed, following, topology),
        received=float(objective.received(placed, current, topology).sum()) / placed.size,
        moved=float((placed != current).mean()),
        local=objective.local_share(placed, following, topology),
        cost=j_cost(counts, topology, placed, current),
        cost_next=j_cost(following, topology, placed, current),
    )


def mean_score(rows: list[Score]) -> Score:
    return Score(*(float(np.mean([getattr(r, f) for r in rows])) for f in Score.__annotations__))


def table(title: str) -> Table:
    view = Table(title=title)
    view.add_column("case")
    view.add_column("placer")
    for name in ("CPU ms", "bal plan", "bal next", "received", "moved", "local", "J", "J next"):
        view.add_column(name, justify="right")
    return view


def add_rows(view: Table, case: str, scores: dict[str, Score]) -> None:
    for index, (name, s) in enumerate(scores.items()):
        view.add_row(
            case if index == 0 else "",
            name,
            f"{s.cpu_ms:.1f}",
            f"{s.planned:.4f}",
            f"{s.following:.4f}",
            f"{100 * s.received:.1f} %",
            f"{100 * s.moved:.1f} %",
            f"{s.local:.3f}",
            f"{s.cost:.4f}",
            f"{s.cost_next:.4f}",
        )
    view.add_section()


def esft_windows(data: Path, mixed: bool, seed: int, count: int = 8) -> Iterator[FloatArray]:
    """`count` windows [4 sources, 26 layers, 64 experts] from ESFT's four tasks.

    Tokens of a task are dealt over the windows in recorded order. `mixed`: every sequence goes to
    a random source instead of the source of its task.
    """
    rng = np.random.default_rng(seed)
    out = np.zeros((count, len(TASKS), 26, 64))
    for number, name in enumerate(TASKS):
        with np.load(data / f"{name}.npz") as file:
            chosen, lengths = file["topk_idx"], file["seq_len"]
        tokens = chosen.shape[1]
        # Tokens, not sequences, make windows of equal size: summaries are few and long.
        window = np.arange(tokens) * count // tokens
        sequence = np.repeat(np.arange(len(lengths)), lengths)
        owner = rng.integers(0, len(TASKS), len(lengths)) if mixed else None
        source = np.full(tokens, number) if owner is None else owner[sequence]
        for at, of in np.ndindex(count, len(TASKS)):
            mine = chosen[:, (window == at) & (source == of)]
            if mine.shape[1]:
                out[at, of] += count_choices(mine, 64, name)
    yield from out


def play_esft(
    data: Path, mixed: bool, makes: dict[str, Callable[[], Plan]], args: argparse.Namespace
) -> dict[str, Score]:
    """Scores on ESFT's routing, 26x64 on 4 ranks, no redundant experts."""
    topology = Topology(4, 16, 1, 8)
    stream = list(esft_windows(data, mixed, args.seed))
    layers, experts = stream[0].shape[1:]
    first = np.tile(np.arange(experts, dtype=np.int32), (layers, 1))
    result = {}
    for name, make in makes.items():
        plan, current, rows, history = make(), first, [], []
        for counts, following in pairwise(stream):
            placed = plan(counts, topology, current)
            history = [*history, (counts, current)][-2:]
            rows.append(score(counts, following, topology, placed, current))
            current = placed
        cpu = timed(make, history, topology, args.repeat)
        result[name] = replace(mean_score(rows[1:]), cpu_ms=cpu)
    return result


def compile_ms() -> float:
    """Wall milliseconds of the first plan in this process: loading or building the search."""
    start = time.perf_counter()
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 99, (4, 2, 8)).astype(float)
    current = np.tile(np.arange(12, dtype=np.int32) % 8, (2, 1))
    gimbal()(counts, Topology(4, 3), current)
    return (time.perf_counter() - start) * 1e3


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--windows", type=int, default=13, help="windows planned per row")
    parser.add_argument("--skip", type=int, default=5, help="first windows left out of the means")
    parser.add_argument("--repeat", type=int, default=5, help="timed calls, of which the least")
    parser.add_argument("--drift", type=float, default=0.97, help="1 is no drift")
    parser.add_argument("--shares", type=float, nargs="*", default=[0.7, 0.3])
    parser.add_argument("--cases", nargs="*", help="only rows whose name contains one of these")
    parser.add_argument("--all", action="store_true", help="every baseline, not only vLLM's")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    """Prints the tables."""
    args = arguments()
    console = Console(width=130)
    console.print(f"loading or compiling the search: {compile_ms():.0f} ms")
    makes = {
        "vllm default": vllm_default,
        "gimbal": gimbal,
        "gimbal, no forecast": gimbal_last_window,
    }
    others = {n: registered(n) for n in PLACERS if n not in ("gimbal", "eplb")}
    for share in args.shares:
        view = table(f"synthetic routing, source share {share}, drift {args.drift}")
        for case in CASES:
            if args.cases is None or any(part in case.name for part in args.cases):
                extra = others if args.all and case.ranks <= 4 else {}
                add_rows(view, case.name, play(case, makes | extra, share, args))
        console.print(view)
    if args.cases is not None:
        return
    data = Path(os.environ.get("GIMBAL_DATA", "../shared/data")) / "esft_deepseek_v2_lite"
    if not data.is_dir():
        console.print(f"skipped: ESFT routing ({data} not found; set GIMBAL_DATA)")
        return
    view = table("ESFT routing of DeepSeek-V2-Lite, 26x64, 4 ranks, four tasks as four sources")
    for name, mixed in (("one task per engine", False), ("mixed at random", True)):
        add_rows(view, name, play_esft(data, mixed, makes | others, args))
    console.print(view)


if __name__ == "__main__":
    main()
