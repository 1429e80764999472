"""``gimbal place``: an expert placement from recorded routing, offline."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from gimbal.commands.options import FIGURES, NameOrFile, OutFile, Real, Whole
from gimbal.commands.output import echo_json, notes, progress_bar
from gimbal.core.cost.profile import profile_names
from gimbal.core.numbers import (
    MOST_EXPERTS,
    MOST_LAYERS,
    MOST_MULTIPLIER,
    MOST_RANKS,
    MOST_TOKENS,
)

if TYPE_CHECKING:
    from gimbal.core.contracts import FloatArray, IntArray, Placer
    from gimbal.core.placement.heuristic import PlacementPlan
    from gimbal.core.placement.problem import CostConstants, PlacementProblem

ROUTING_HELP = "counts [source, layer, expert], .npz; or one recording per source, in order"
STEP_TOKENS_HELP = "tokens per source and step, where the file does not count its steps"
PLACER_HELP = "a baseline, an installed placer, or module:Class"
FILE = click.Path(path_type=Path)
RANKS, SLOTS = Whole(1, MOST_RANKS), Whole(1, MOST_EXPERTS)
STEPS, TOKENS, SECONDS = Whole(1, 10**9), Whole(1, MOST_TOKENS), Real(above=0.0, most=1e7)
FACTOR = Real(0.0, MOST_MULTIPLIER)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--routing", type=FILE, required=True, multiple=True, help=ROUTING_HELP)
@click.option("--ranks", type=RANKS, required=True, help="expert-parallel ranks")
@click.option("--slots-per-rank", type=SLOTS, help="default: as --current, else no redundancy")
@click.option("--current", type=FILE, help="physical_to_logical [layer, slot], .npz")
@click.option("--next", "next_file", type=FILE, help="counts of a later window to score on")
@click.option("--history", type=FILE, multiple=True, help="earlier windows, oldest first: forecast")
@click.option(
    "--profile",
    type=NameOrFile(profile_names),
    metavar="NAME|FILE",
    default="h100-qwen3-30b-a3b",
    show_default=True,
    help="cost profile",
)
@click.option("--model-dir", type=FILE, help="model routed: its bytes and top-k, not the profile's")
@click.option(
    "--backend",
    type=click.Choice(["all2all", "allgather_reducescatter"]),
    default="all2all",
    show_default=True,
    help="the second gathers every token anyway: no communication term",
)
@click.option(
    "--ranks-per-source", "--tp", type=RANKS, default=1, show_default=True, help="TP size"
)
@click.option("--ranks-per-node", type=RANKS, default=8, show_default=True)
@click.option("--alpha", type=FACTOR, default=1.0, show_default=True, help="load multiplier")
@click.option(
    "--beta", type=FACTOR, default=1.0, show_default=True, help="communication multiplier"
)
@click.option("--gamma", type=FACTOR, default=1.0, show_default=True, help="migration multiplier")
@click.option("--horizon-steps", type=STEPS, default=3000, show_default=True, help="pays for moves")
@click.option("--step-tokens", type=TOKENS, default=2048, show_default=True, help=STEP_TOKENS_HELP)
@click.option("--max-received", type=Whole(), help="budget of experts that change rank")
@click.option(
    "--expert-groups", type=SLOTS, default=1, show_default=True, help="groups share a node"
)
@click.option("--placer", default="gimbal", show_default=True, help=PLACER_HELP)
@click.option("--placer-option", multiple=True, metavar="KEY=VALUE", help="one of its options")
@click.option("--exact", is_flag=True, help="also solve to optimality (small instances)")
@click.option(
    "--time-limit", type=SECONDS, default=60.0, show_default=True, help="s per exact layer"
)
@click.option("--exact-layers", type=Whole(1), help="solve only the first so many layers exactly")
@click.option("--out", type=OutFile(), help="write the placement here")
@click.option("--format", "form", type=click.Choice(["npz", "sglang", "trtllm"]), default="npz")
@click.option(
    "--first-layer",
    type=Whole(0, MOST_LAYERS),
    default=0,
    help="model layer of the first MoE layer",
)
@click.option(
    "--plot", type=OutFile(FIGURES), help="figure to write: rank loads, who asks for what"
)
@click.option("--json", "as_json", is_flag=True, help="print one JSON object")
def command(**values: Any) -> None:
    """Plan where experts should live, and say what it costs, gains and moves.

    Costs are microseconds per step over all layers. The lower bound holds for every placement;
    the gap is the plan's distance from it.

    Example: gimbal place --routing routing.npz --ranks 8 --slots-per-rank 17 --out plan.npz
    """
    with progress_bar(notes(), "reading") as bar:
        problem, following = _read(values)
        bar.say("compiling the placer")
        placer = _placer(problem, values)
    plan, cpu_ms = _plan(problem, placer, values["placer"])  # timed: nothing is drawn beside it
    report = _report(problem, plan, following, cpu_ms)
    if values["exact"]:
        report["exact"] = _exact(problem, plan, values)
    if values["out"]:
        _write(plan.physical_to_logical, values)
    if values["plot"]:
        from gimbal.report.placement_plot import plot_placement

        counts, current = problem.routing.counts, problem.current
        plot_placement(counts, current, plan.physical_to_logical, problem.topology, values["plot"])
    if values["as_json"]:
        echo_json(report)
    else:
        _print(report, problem)


def _read(values: dict[str, Any]) -> tuple[PlacementProblem, FloatArray | None]:
    """The problem of the command line, and the later window to score on."""
    from dataclasses import replace

    from gimbal.core.contracts import Topology
    from gimbal.core.cost.profile import load_profile
    from gimbal.core.errors import InputError, one_line
    from gimbal.core.placement.problem import PlacementProblem, constants_of, validate_counts
    from gimbal.workloads.routing import read_routing

    profile = load_profile(values["profile"])
    recording = read_routing(values["routing"])
    routing = recording.routing
    total = validate_counts(routing.counts, f"{values['routing'][0]}: counts")
    current, per_rank = _slots(values, routing.counts.shape, recording.physical_to_logical)
    topology = Topology(
        values["ranks"], per_rank, values["ranks_per_source"], values["ranks_per_node"]
    )
    answered = recording.metadata.get("answered")
    if answered and len(routing.counts) < topology.sources:
        said = f"{values['routing'][0]}: only what ranks {one_line(answered)} send"
        raise InputError(f"{said}: record on every host, and give all files (--routing, once each)")
    constants = constants_of(profile)
    if values["model_dir"]:
        constants = _for_model(constants, values["model_dir"], routing.counts.shape)
    if routing.steps <= 1:
        pairs = float(total.sum(axis=1).mean())
        step_pairs = values["step_tokens"] * topology.sources * constants.top_k
        routing = replace(routing, steps=max(1, round(pairs / step_pairs)))
    names = ("alpha", "beta", "gamma", "horizon_steps", "backend", "max_received", "expert_groups")
    problem = PlacementProblem(
        routing, topology, current, constants, **{name: values[name] for name in names}
    )
    following = None
    if values["next_file"]:
        following = read_routing(values["next_file"], problem.experts).counts
        _same_shape(following, routing.counts, f"{values['next_file']}: counts")
    return problem, following


def _for_model(base: CostConstants, folder: Path, shape: tuple[int, ...]) -> CostConstants:
    """`base` for the model in `folder`; raises InputError where it is not what was recorded."""
    from gimbal.core.errors import InputError
    from gimbal.core.model import read_architecture, read_config
    from gimbal.core.model.architecture import ACTIVATION_BYTES
    from gimbal.core.placement.problem import constants_for_model

    model = read_architecture(read_config(folder))
    own = (model.experts.layers, model.experts.experts)
    if shape[1:] != own:
        raise InputError(
            f"--model-dir {folder}: {own[0]} MoE layers of {own[1]} experts, --routing has "
            f"{shape[1]} of {shape[2]}"
        )
    hidden_bytes = model.experts.inputs * ACTIVATION_BYTES
    return constants_for_model(base, model.expert_bytes, hidden_bytes, model.experts.top_k)


def _same_shape(counts: FloatArray, like: FloatArray, name: str) -> None:
    from gimbal.core.errors import InputError
    from gimbal.core.placement.problem import validate_counts

    if counts.shape != like.shape:
        raise InputError(f"{name}: shape {counts.shape}, --routing has {like.shape}")
    validate_counts(counts, name)


def _slots(
    values: dict[str, Any], shape: tuple[int, ...], recorded: IntArray | None
) -> tuple[IntArray, int]:
    """The placement to start from and slots per rank; vLLM's initial one where none is given."""
    from gimbal.core.errors import InputError
    from gimbal.core.placement.problem import slots_per_rank

    _, layers, experts = shape
    ranks, wanted = values["ranks"], values["slots_per_rank"]
    current = _read_placement(values["current"]) if values["current"] else recorded
    if current is not None:
        if current.ndim != 2:
            raise InputError(f"current: expected [layer, slot], got {current.ndim} dimension(s)")
        per_rank = slots_per_rank(current.shape[1], ranks)
        if wanted in (None, per_rank):
            return current, per_rank
        if values["current"]:
            raise InputError(
                f"current: {current.shape[1]} slots over {ranks} ranks are {per_rank} per rank, "
                f"--slots-per-rank is {wanted}"
            )
    per_rank = slots_per_rank(experts, ranks) if wanted is None else wanted
    if per_rank > experts:
        raise InputError(f"--slots-per-rank {per_rank}: there are only {experts} experts")
    first = np.arange(per_rank * ranks, dtype=np.int32) % experts
    return np.tile(first, (layers, 1)), per_rank


def _read_placement(path: Path) -> IntArray:
    """`physical_to_logical` [layer, slot] of an ``.npz``; raises InputError naming the file."""
    from gimbal.core.errors import InputError
    from gimbal.workloads.arrays import read_npz

    arrays = read_npz(path)
    if "physical_to_logical" not in arrays:
        raise InputError(f"{path}: no array physical_to_logical, but {', '.join(sorted(arrays))}")
    placement = arrays["physical_to_logical"]
    if not np.issubdtype(placement.dtype, np.integer):
        raise InputError(f"{path}: physical_to_logical must be integers, is {placement.dtype}")
    if not np.array_equal(placement, placement.astype(np.int32)):
        raise InputError(f"{path}: physical_to_logical: an expert beyond 32 bits")
    return placement.astype(np.int32)


def _placer(problem: PlacementProblem, values: dict[str, Any]) -> Any:
    """The placer that was asked for, what it runs compiled, earlier windows shown to it."""
    from gimbal.core.placement import PLACERS

    name, options = values["placer"], _options(values["placer_option"])
    placer = PLACERS.build(name, options)
    _show_history(placer, problem, values)  # first: half a minute of compiling would hide a fault
    _warm_up(PLACERS.build(name, options))
    return placer


def _plan(problem: PlacementProblem, placer: Any, name: str) -> tuple[PlacementPlan, float]:
    """The plan and its CPU milliseconds."""
    from gimbal.core.placement import heuristic
    from gimbal.core.placement.kinds import MEAN_STEP
    from gimbal.core.placement.verify import answer

    start = time.process_time()
    if hasattr(placer, "plan_kinds"):
        plan: PlacementPlan = placer.plan_kinds([problem], MEAN_STEP)
        return plan, (time.process_time() - start) * 1e3
    placed = answer(name, placer, problem.routing, problem.topology, problem.current)
    cpu_ms = (time.process_time() - start) * 1e3
    return heuristic.price(problem, placed), cpu_ms


def _exact(problem: PlacementProblem, plan: PlacementPlan, values: dict[str, Any]) -> Any:
    from gimbal.core.placement import exact

    placed, limit_s, layers = (
        plan.physical_to_logical,
        values["time_limit"],
        values["exact_layers"],
    )
    with progress_bar(notes(), "solving layers exactly") as bar:
        return exact.compare(problem, placed, limit_s, layers, bar.update).as_dict()


def _options(words: tuple[str, ...]) -> dict[str, Any]:
    """``key=value`` words as options, values read as YAML."""
    from gimbal.core.errors import InputError
    from gimbal.core.yaml_reader import parse_yaml

    options: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise InputError(f"--placer-option {word!r}: expected key=value")
        try:
            options[key] = parse_yaml(value, "")
        except InputError:
            options[key] = value
    return options


def _warm_up(placer: Placer) -> None:
    """Has `placer`, which is thrown away, compile what planning runs."""
    from gimbal.core.contracts import RoutingCounts, Topology

    counts = np.arange(1, 33).reshape(2, 2, 8).astype(np.float64)
    current = np.tile(np.arange(10, dtype=np.int32) % 8, (2, 1))
    with contextlib.suppress(Exception):  # what is wrong with it shows on the real problem
        placer.place(RoutingCounts(counts), Topology(2, 5), current)


def _show_history(placer: Placer, problem: PlacementProblem, values: dict[str, Any]) -> None:
    """Earlier windows for a placer that learns from them."""
    from gimbal.core.errors import InputError
    from gimbal.workloads.routing import read_routing

    if not values["history"]:
        return
    learn = getattr(placer, "learn", None)
    if learn is None:
        raise InputError(f"--history: placer {values['placer']!r} learns nothing from it")
    for path in values["history"]:
        counts = read_routing(path, problem.experts).counts
        _same_shape(counts, problem.routing.counts, f"{path}: counts")
        learn(counts.sum(axis=0))


def _report(
    problem: PlacementProblem, plan: PlacementPlan, following: FloatArray | None, cpu_ms: float
) -> dict[str, Any]:
    from gimbal.core.placement.objective import balance, local_share

    placed, topology = plan.physical_to_logical, problem.topology
    next_balance = None if following is None else balance(placed, following, topology)
    next_share = None if following is None else local_share(placed, following, topology)
    return {
        "cost_us": {"before": plan.before.as_dict(), "after": plan.after.as_dict()},
        "lower_bound_us": plan.lower_bound_us,
        "gap": plan.gap,
        "balance": {
            "before": plan.balance_before,
            "planned": plan.balance_planned,
            "next": next_balance,
        },
        "local_share": {
            "before": plan.local_share_before,
            "planned": plan.local_share_planned,
            "next": next_share,
        },
        "received_experts": plan.received_experts,
        "moved_slots": plan.moved_slots,
        "slots": plan.slots,
        "cpu_ms": cpu_ms,
        "communication": problem.communicates,
    }


def _write(placement: IntArray, values: dict[str, Any]) -> None:
    from gimbal.core.files import write_text, writing
    from gimbal.core.placement.formats import FORMATS

    if values["form"] == "npz":
        # savez would add a suffix to the name
        with writing(values["out"]), values["out"].open("wb") as file:
            np.savez(file, physical_to_logical=placement)
        return
    write_text(values["out"], FORMATS[values["form"]](placement, values["first_layer"]))


def _print(report: dict[str, Any], problem: PlacementProblem) -> None:
    from rich.console import Console
    from rich.table import Table

    view = Table()
    for name in ("", "before", "after", "next window"):
        view.add_column(name, justify="left" if not name else "right")
    costs = report["cost_us"]
    for term in ("load", "comm", "migration", "total"):
        before, after = f"{costs['before'][term]:.1f}", f"{costs['after'][term]:.1f}"
        view.add_row(f"{term}, us per step", before, after, "")
    for name, label in (("balance", "balance (mean/max)"), ("local_share", "local share")):
        row = report[name]
        later = "" if row["next"] is None else f"{row['next']:.4f}"
        view.add_row(label, f"{row['before']:.4f}", f"{row['planned']:.4f}", later)
    console = Console()
    console.print(view)
    console.print(
        f"lower bound {report['lower_bound_us']:.1f} us, gap {100 * report['gap']:.2f} %; "
        f"{report['received_experts']} experts change rank, {report['moved_slots']} of "
        f"{report['slots']} slots change; planned in {report['cpu_ms']:.1f} ms CPU",
        highlight=False,
    )
    if not report["communication"]:
        why = "every rank gathers every token" if problem.backend != "all2all" else "one source"
        console.print(f"communication term off: {why}", highlight=False)
    if "exact" in report:
        e = report["exact"]
        console.print(
            f"exact: best {e['exact_us']:.2f} us, proven {e['bound_us']:.2f} us on "
            f"{e['layers']} layer(s), {e['optimal_layers']} optimal, {e['seconds']:.1f} s; the "
            f"plan is {100 * e['gap']:.3f} % above the best, at most "
            f"{100 * e['proven_gap']:.3f} % above the optimum",
            highlight=False,
        )
