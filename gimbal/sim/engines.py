"""The engines of one run: one per DP rank, or a single one that stands for a pool of all."""

from __future__ import annotations

from gimbal.core.config import QueueConfig
from gimbal.core.contracts import traits_of
from gimbal.core.queue import ORDERINGS
from gimbal.core.queue.traits import usable
from gimbal.sim.cluster import Cluster
from gimbal.sim.engine import Engine
from gimbal.sim.policies import SimPolicies
from gimbal.sim.step_view import Group


def engines_of(
    cluster: Cluster,
    policies: SimPolicies,
    kv_tokens: int,
    domains: int,
    group: Group,
    kind: type[Engine] = Engine,
) -> list[Engine]:
    """In rank order; the pool of `gimbal.report.arms.Simulated` is one with everything of all.

    Args:
        kv_tokens: of one DP rank.
        domains: routing domains.
        group: what the engines tell each other.
        kind: what they are with prefill and decode apart, see `gimbal.sim.roles`.
    """
    pooled = cluster.dp if policies.simulated.pool else 1
    return [
        _engine(index, cluster, policies.queue, kv_tokens, domains, group, pooled, kind)
        for index in range(cluster.dp // pooled)
    ]


def _engine(
    index: int,
    cluster: Cluster,
    queue: QueueConfig,
    kv_tokens: int,
    domains: int,
    group: Group,
    pooled: int,
    kind: type[Engine],
) -> Engine:
    ordering = ORDERINGS.build(queue.ordering, queue.options)
    return kind(
        index,
        cluster.max_num_batched_tokens * pooled,
        cluster.max_num_seqs * pooled,
        kv_tokens // cluster.block_size * pooled,
        cluster.block_size,
        ordering,
        cluster.enable_prefix_caching,
        cluster.long_prefill_token_threshold,
        domains,
        usable(queue, traits_of(ordering)),
        group,
    )
