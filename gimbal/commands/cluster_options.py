"""The options that say what is simulated: a cluster, or a model on GPUs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from gimbal.commands.arm_options import read_arm_options
from gimbal.commands.options import NameOrFile, Whole
from gimbal.commands.workload_options import read_trace_options
from gimbal.core.errors import InputError
from gimbal.core.model import model_names
from gimbal.core.model.architecture import KV_DTYPES
from gimbal.core.numbers import MOST_RANKS
from gimbal.core.placement.backends import BACKENDS

if TYPE_CHECKING:
    from gimbal.sim.cluster import Cluster
    from gimbal.sim.comparison import ComparisonOptions
    from gimbal.workloads import WorkloadOptions

Function = TypeVar("Function", bound=Callable[..., Any])


def _clusters() -> list[str]:
    from gimbal.sim.cluster import cluster_names

    return cluster_names()


DEFAULT_CLUSTER = "h100x4-paper"
_RANKS = Whole(1, MOST_RANKS)
_OPTIONS = [
    click.option(
        "--cluster",
        type=NameOrFile(_clusters),
        metavar="NAME|FILE",
        help=f"named cluster, or a YAML file (default: {DEFAULT_CLUSTER})",
    ),
    click.option(
        "--model",
        type=NameOrFile(model_names),
        metavar="NAME|FILE",
        help="instead of a cluster: packaged model, model folder or config.json",
    ),
    click.option("--gpu", help="of --model: a100, h100, h200, b200 or l40s"),
    click.option("--dp", type=_RANKS, help="of --model: data-parallel engines"),
    click.option("--tp", type=_RANKS, help="of --model: GPUs of an engine (default: 1)"),
    click.option("--gpus-per-node", type=_RANKS, help="of --model: behind one switch (default: 8)"),
    click.option(
        "--backend",
        type=click.Choice(list(BACKENDS)),
        help="of --model: how tokens reach experts (default: vLLM's, allgather_reducescatter)",
    ),
    click.option(
        "--kv-cache-dtype",
        type=click.Choice(["auto", *KV_DTYPES]),
        help="of --model: as the server has it (default: auto)",
    ),
]
_OF_MODEL = ("gpu", "dp", "tp", "gpus_per_node", "backend", "kv_cache_dtype")


def cluster_options(function: Function) -> Function:
    """Adds the options to a command; `read_cluster_options` takes them back."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def read_cluster_options(values: dict[str, Any]) -> str | Cluster:
    """A cluster's name or file, or the one that the options describe; raises InputError."""
    from gimbal.sim.cluster import model_cluster

    given = {name: values[name] for name in _OF_MODEL if values[name] is not None}
    if values["model"] is None:
        for name in given:
            raise InputError(f"--{name.replace('_', '-')}: goes with --model")
        return values["cluster"] or DEFAULT_CLUSTER
    if values["cluster"] is not None:
        raise InputError("--cluster and --model: give one of them")
    for name in ("gpu", "dp"):
        if name not in given:
            raise InputError(f"--model: give --{name} as well")
    if "gpus_per_node" in given:
        given["ranks_per_node"] = given.pop("gpus_per_node")
    return model_cluster(values["model"], **given)


def comparison_options(values: dict[str, Any], workload: WorkloadOptions) -> ComparisonOptions:
    """What a command's options ask for, `workload` among it; raises InputError."""
    from gimbal.report.metrics import parse_slo
    from gimbal.sim.comparison import ComparisonOptions

    return ComparisonOptions(
        cluster=read_cluster_options(values),
        trace=read_trace_options(values),
        workload=workload,
        arms=tuple(read_arm_options(values)),
        repeats=values["repeat"],
        seed=values["seed"],
        load=values.get("load"),
        settle_s=values["settle"],
        slo=parse_slo(values["slo"]),
    )
