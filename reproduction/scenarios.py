"""Named conditions under which the paper's evaluation is repeated, each with its reason.

A scenario is the cluster ``h100x4-paper`` (DP=2, TP=2, EP=4, Qwen3-30B-A3B) with other engine
settings, profile constants or lengths. The paper does not say which held for its figures
(vLLM's version, eager or graphs, token budget, how often EPLB ran), so each is reported.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from gimbal.core.cost.profile import Profile
from gimbal.core.placement.backends import ROUTED_BACKEND
from gimbal.sim.cluster import Cluster, load_cluster
from gimbal.workloads import WorkloadOptions

CLUSTER = "h100x4-paper"


@dataclass(frozen=True, slots=True)
class Scenario:
    """Attributes:
    why: what the variant stands for.
    cluster, profile, workload: fields that differ from the packaged ones.
    routed: experts are reached by a routed all-to-all instead of all-gather/reduce-scatter.
    more_arms: arms that are worth asking about here only.
    """

    name: str
    why: str
    cluster: dict[str, Any] = field(default_factory=dict)
    profile: dict[str, Any] = field(default_factory=dict)
    workload: dict[str, Any] = field(default_factory=dict)
    routed: bool = False
    more_arms: tuple[str, ...] = ()

    def build(self) -> tuple[Cluster, Profile]:
        """The varied cluster and profile."""
        cluster, profile = load_cluster(CLUSTER)
        cluster = dataclasses.replace(cluster, **self.cluster)
        profile = dataclasses.replace(profile, **self.profile)
        if self.routed:
            # A routed exchange keeps the collectives' latency; its bytes are priced by placement.
            terms = tuple(
                dataclasses.replace(term, per_unit_us=0.0) for term in profile.per_group_token
            )
            profile = dataclasses.replace(profile, backend=ROUTED_BACKEND, per_group_token=terms)
        return cluster, profile

    def options(self, distribution: str, requests: int, rate_rps: float | None) -> WorkloadOptions:
        """The workload: gamma arrivals of CV 2 unless the scenario says otherwise."""
        values: dict[str, Any] = {"arrivals": "gamma", "cv": 2.0, **self.workload}
        return WorkloadOptions(
            requests=requests, distribution=distribution, rate_rps=rate_rps, **values
        )


_OLD = {
    "async_scheduling": False,
    "max_num_batched_tokens": 2048,
    "max_num_seqs": 256,
    "eplb_async": False,
}

SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario(
            "today",
            "vLLM 0.32 as it comes on this machine: asynchronous EPLB and scheduling, CUDA graphs, "
            "8192-token budget, 1024 seats",
            more_arms=("gimbal-no-graphs",),
        ),
        Scenario(
            "paper-era",
            "vLLM of 2025 run eagerly: synchronous EPLB (0.72 s per rearrangement, every 3000 "
            "steps), synchronous scheduler with 1 ms of host time, 0.8 ms of kernel launches per "
            "layer, 2048-token budget, 256 seats",
            _OLD,
            {"host_us": 1000.0, "graph_tokens": 0, "launch_layer_us": 800.0},
        ),
        Scenario(
            "frequent-eplb",
            "the same with CUDA graphs and EPLB every 300 steps: a stall of 0.72 s every few "
            "seconds, which is what makes figures of the paper's size appear",
            {**_OLD, "eplb_step_interval": 300},
            {"host_us": 1000.0},
        ),
        Scenario(
            "long-prompts",
            "today's engine with 2048-token budget, 256 seats and six times BurstGPT's prompts and "
            "outputs, cut at 30000 and 150 tokens: prefill work queues, and one prompt is many "
            "steps",
            {"max_num_batched_tokens": 2048, "max_num_seqs": 256},
            {},
            {"scale_length": 6.0, "max_prompt": 30_000, "max_output": 150},
        ),
        Scenario(
            "routed",
            "today with a routed all-to-all: the only one in which bytes depend on who asks for "
            "which expert, and so the only one in which the loop between levels has a lever",
            {"eplb_step_interval": 1000},
            routed=True,
            more_arms=("gimbal-owner", "gimbal-affinity"),
        ),
    )
}


@lru_cache(maxsize=len(SCENARIOS))
def built(name: str) -> tuple[Cluster, Profile]:
    """`Scenario.build` by name, once per process."""
    return SCENARIOS[name].build()
