"""The simulated cluster: a profile, its layout and the engine settings, as named YAML."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from gimbal.core.contracts import Topology
from gimbal.core.cost.profile import Profile, load_profile
from gimbal.core.errors import InputError, nearest
from gimbal.core.named_yaml import packaged_names, read_named_yaml
from gimbal.core.numbers import MOST_EXPERTS
from gimbal.core.options import Count, NotNegative, PositiveCount, Ranks, WholeNumber, complaint
from gimbal.core.placement.problem import validate_topology

Slots = Annotated[WholeNumber, Field(ge=0, le=MOST_EXPERTS)]


@dataclass(frozen=True, slots=True)
class Cluster:
    """Engine settings of one simulated deployment; names follow vLLM's flags.

    Attributes:
        profile: cost-model profile by name or path.
        dp, tp: layout; EP ranks = dp * tp.
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
    """

    name: str
    profile: str
    dp: Ranks
    tp: Ranks = 1
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

    __pydantic_config__ = ConfigDict(extra="forbid")

    @property
    def ranks(self) -> int:
        return self.dp * self.tp


_ADAPTER = TypeAdapter(Cluster)
_PACKAGED = ("gimbal.sim", "clusters")


def cluster_names() -> list[str]:
    """Names of the packaged clusters."""
    return packaged_names(*_PACKAGED)


def load_cluster(name_or_path: str | Path) -> tuple[Cluster, Profile]:
    """A packaged cluster by name, or a YAML file, with its profile; raises InputError."""
    values: Any = read_named_yaml("cluster", *_PACKAGED, name_or_path)
    if not isinstance(values, dict):
        raise InputError(f"cluster {name_or_path}: expected a mapping")
    values.setdefault("name", Path(name_or_path).stem)
    try:
        cluster = _ADAPTER.validate_python(values)
    except ValidationError as error:
        found = complaint(error)
        known = [f.name for f in dataclasses.fields(Cluster)]
        hint = nearest(found.key, known) if found.unknown else ""
        raise InputError(f"cluster {name_or_path}: {found.key}: {found.text}{hint}") from None
    try:
        return cluster, _fitting_profile(cluster)
    except InputError as error:
        raise InputError(f"cluster {name_or_path}: {error}") from None


def _fitting_profile(cluster: Cluster) -> Profile:
    """The cluster's profile; raises InputError where its experts do not fit on the ranks."""
    profile = load_profile(cluster.profile)
    experts = profile.model.experts
    if experts % cluster.ranks and not cluster.slots_per_rank:
        raise InputError(
            f"{experts} experts do not divide over {cluster.ranks} ranks; set slots_per_rank"
        )
    slots = cluster.slots_per_rank or experts // cluster.ranks
    topology = Topology(cluster.ranks, slots, cluster.tp, cluster.ranks_per_node)
    validate_topology(topology, (cluster.dp, profile.model.layers, experts))
    return profile
