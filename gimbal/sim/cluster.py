"""The simulated cluster: a profile, its layout and the engine settings, as named YAML.

A cluster that names a model and a GPU instead of a profile gets one that is derived for it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from gimbal.core.contracts import Topology
from gimbal.core.cost.derive import derive_profile
from gimbal.core.cost.kernels import GPUS
from gimbal.core.cost.profile import Layout, Profile, load_profile
from gimbal.core.errors import InputError, nearest
from gimbal.core.model import find_model
from gimbal.core.named_yaml import packaged_names, read_named_yaml
from gimbal.core.numbers import MOST_EXPERTS
from gimbal.core.options import Count, NotNegative, PositiveCount, Ranks, WholeNumber, complaint
from gimbal.core.placement.backends import BACKENDS, GATHER_BACKEND
from gimbal.core.placement.problem import validate_topology

LARGE_GB, SMALL_GB = 172, 75
"""GPUs of more memory take more tokens in a step, of less memory fewer (vLLM 0.33,
``EngineArgs.get_batch_defaults``); so does the A100."""

Slots = Annotated[WholeNumber, Field(ge=0, le=MOST_EXPERTS)]


_STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True, slots=True)
class KvTransfer:
    """How the KV cache of a prompt gets from a prefill engine to a decode engine.

    Attributes:
        gb_per_s: of an engine's network, each way; 0 takes the profile's network cards, one per
            GPU.
        latency_us: of each transfer beside its bytes.
    """

    gb_per_s: NotNegative = 0.0
    latency_us: NotNegative = 0.0

    __pydantic_config__ = _STRICT


@dataclass(frozen=True, slots=True)
class Cluster:
    """Engine settings of one simulated deployment; names follow vLLM's flags.

    With `prefill` it has prefill and decode apart: it then is the engines that decode.

    Attributes:
        dp, tp: layout; EP ranks = dp * tp.
        profile: cost-model profile by name or path.
        model, gpu: instead of a profile: packaged model, folder or configuration file, and a key
            of `kernels.GPUS`.
        kv_cache_dtype: of such a model, as vLLM's flag.
        backend: of such a model, how tokens reach experts: one of `placement.backends.BACKENDS`.
        ranks_per_node: EP ranks that share a node.
        slots_per_rank: physical experts per rank and layer; 0 means experts / ranks.
        kv_tokens: KV pool of one DP engine; 0 takes the profile's.
        prefill_schedule_interval: prefills run beside decodes every so many steps only, the same on
            all engines, until a step leaves somebody waiting.
        long_prefill_token_threshold: largest chunk of one prompt per step; 0 is no limit.
        async_scheduling: step k+1 is scheduled while step k runs, so what arrives during k is
            first scheduled in k+2.
        stats_interval_ms: the coordinator forwards request counts at most this often.
        enable_eplb: experts are rearranged, by vLLM's EPLB or by level `placement`.
        eplb_step_interval: steps, as in vLLM's --eplb-config; the window is the whole interval.
        eplb_async: experts move layer by layer beside the steps instead of stalling one.
        routing: name of the routing population (see `gimbal.sim.routing.named_population`).
        prefill: the engines that prefill, in lock step of their own; in a file what it does not say
            is as with the engines that decode.
        kv_transfer: from those to these.
    """

    name: str
    dp: Ranks
    tp: Ranks = 1
    profile: str = ""
    model: str = ""
    gpu: str = ""
    kv_cache_dtype: str = "auto"
    backend: str = GATHER_BACKEND
    ranks_per_node: Ranks = 8
    slots_per_rank: Slots = 0
    max_num_batched_tokens: PositiveCount = 8192
    max_num_seqs: PositiveCount = 1024
    block_size: PositiveCount = 16
    kv_tokens: Count = 0
    enable_prefix_caching: bool = True
    prefill_schedule_interval: PositiveCount = 1
    long_prefill_token_threshold: Count = 0
    async_scheduling: bool = True
    stats_interval_ms: NotNegative = 100.0
    enable_eplb: bool = True
    eplb_step_interval: PositiveCount = 3000
    eplb_async: bool = True
    routing: str = "domains"
    prefill: Cluster | None = None
    kv_transfer: KvTransfer | None = None

    __pydantic_config__ = _STRICT

    @property
    def ranks(self) -> int:
        return self.dp * self.tp


_ADAPTER = TypeAdapter(Cluster)
_PACKAGED = ("gimbal.sim", "clusters")


def cluster_names() -> list[str]:
    """Names of the packaged clusters."""
    return packaged_names(*_PACKAGED)


def load_cluster(wanted: str | Path | Cluster) -> tuple[Cluster, Profile]:
    """A packaged cluster by name, a YAML file or a cluster, with its profile; raises InputError."""
    if isinstance(wanted, Cluster):
        return wanted, _profiles(wanted)
    values: Any = read_named_yaml("cluster", *_PACKAGED, wanted)
    if not isinstance(values, dict):
        raise InputError(f"cluster {wanted}: expected a mapping")
    values.setdefault("name", Path(wanted).stem)
    if isinstance(prefill := values.get("prefill"), dict):
        apart = ("prefill", "kv_transfer")
        if any(key in prefill for key in apart):
            raise InputError(f"cluster {wanted}: prefill: expected settings of engines alone")
        shared = {k: v for k, v in values.items() if k not in apart}
        values["prefill"] = shared | {"name": f"{values['name']} (prefill)"} | prefill
    try:
        cluster = _ADAPTER.validate_python(values)
    except ValidationError as error:
        found = complaint(error)
        known = [f.name for kind in (Cluster, KvTransfer) for f in dataclasses.fields(kind)]
        hint = nearest(found.path[-1], known) if found.unknown else ""
        raise InputError(f"cluster {wanted}: {found.key}: {found.text}{hint}") from None
    try:
        return cluster, _profiles(cluster)
    except InputError as error:
        raise InputError(f"cluster {wanted}: {error}") from None


def _profiles(cluster: Cluster) -> Profile:
    """The cluster's profile, once that of its prefill engines is found to go with it."""
    profile = profile_of(cluster)
    if cluster.prefill is None:
        if cluster.kv_transfer is not None:
            raise InputError("kv_transfer: goes with prefill")
        return profile
    try:
        other = profile_of(cluster.prefill)
    except InputError as error:
        raise InputError(f"prefill: {error}") from None
    if other.model != profile.model:
        raise InputError("prefill: expected the model of the engines that decode")
    return profile


def model_cluster(model: str, gpu: str, dp: int, **settings: Any) -> Cluster:
    """`model` on GPUs, with vLLM's defaults for as much memory.

    Args:
        settings: fields of `Cluster` that are not as they come.
    """
    path = Path(model)
    named = (path.parent if path.suffix == ".json" else path).name or "model"
    name = f"{named}-{gpu}-dp{dp}-tp{settings.get('tp', 1)}"
    large = gpu in GPUS and GPUS[gpu].memory_gb > LARGE_GB
    small = gpu in GPUS and (GPUS[gpu].memory_gb < SMALL_GB or gpu == "a100")
    tokens, seats = (16384, 1024) if large else (2048, 256) if small else (8192, 1024)
    return Cluster(
        name,
        dp,
        model=model,
        gpu=gpu,
        max_num_batched_tokens=tokens,
        max_num_seqs=seats,
        **settings,
    )


def described(cluster: Cluster, profile: Profile) -> Iterator[str]:
    """What a derived cluster is and what its figures rest on, a line each; of a measured one no
    more than that prefill is apart."""
    if cluster.prefill is not None:
        yield (
            f"{cluster.name}: {cluster.prefill.dp} prefill and {cluster.dp} decode engines; a "
            "client's first token comes from the decode engine, which computes a prompt's last anew"
        )
    if not profile.estimated:
        return
    if cluster.prefill is not None:
        yield from _sizes(cluster.prefill, profile_of(cluster.prefill))
    yield from _sizes(cluster, profile)
    yield from profile.notes


def _sizes(cluster: Cluster, profile: Profile) -> Iterator[str]:
    blocks = profile.kv_tokens // cluster.block_size
    nodes = -(-cluster.ranks // cluster.ranks_per_node)
    yield (
        f"{cluster.name}: {cluster.ranks} GPUs on {nodes} node{'s' * (nodes > 1)}, {cluster.dp} "
        f"engines in lock step; per GPU {profile.model.experts / cluster.ranks:g} of "
        f"{profile.model.experts} experts of each of {profile.model.layers} layers, "
        f"{profile.model.expert_bytes / 1e6:.1f} MB each"
    )
    yield (
        f"KV cache of an engine: {profile.kv_tokens:,} tokens, {blocks:,} blocks of "
        f"{cluster.block_size}; {profile.model.kv_bytes_per_token:,} bytes per token of all layers"
    )


def profile_of(cluster: Cluster) -> Profile:
    """The cluster's profile; raises InputError where its experts do not fit on the ranks."""
    if bool(cluster.profile) == bool(cluster.model) or bool(cluster.model) != bool(cluster.gpu):
        raise InputError("expected a profile, or a model and a gpu")
    profile = _derived(cluster) if cluster.model else load_profile(cluster.profile)
    experts = profile.model.experts
    if experts % cluster.ranks and not cluster.slots_per_rank:
        raise InputError(
            f"{experts} experts do not divide over {cluster.ranks} ranks; set slots_per_rank "
            "in the cluster's file"
        )
    slots = cluster.slots_per_rank or experts // cluster.ranks
    topology = Topology(cluster.ranks, slots, cluster.tp, cluster.ranks_per_node)
    validate_topology(topology, (cluster.dp, profile.model.layers, experts))
    return profile


def _derived(cluster: Cluster) -> Profile:
    """The estimate for the cluster's model; raises InputError where its weights do not fit."""
    if cluster.backend not in BACKENDS:
        raise InputError(f"unknown backend {cluster.backend!r}{nearest(cluster.backend, BACKENDS)}")
    profile = derive_profile(
        cluster.name,
        find_model(cluster.model),
        cluster.gpu,
        Layout(cluster.dp, cluster.tp),
        cluster.kv_cache_dtype,
        cluster.backend,
        cluster.ranks_per_node,
    )
    if not profile.kv_tokens:
        raise InputError(f"{cluster.model} {profile.notes[-1]}")
    return profile
