"""A pytest plugin: vLLM's own tests with Gimbal's scheduler and placement policy in its place.

`scripts/peers.py` loads it in both of its runs (``-p peers_swap``). ``GIMBAL_PEERS`` holds Gimbal's
configuration as JSON; where it is empty nothing is swapped. Names are swapped before vLLM's test
modules import them, so a test that builds a ``Scheduler`` builds Gimbal's.
"""

from __future__ import annotations

import json
import os
import time
from typing import Any

import numpy as np
import pytest

from gimbal.core.config import GimbalConfig, PlacementConfig, parse_config
from gimbal.core.contracts import IntArray, RoutingCounts, Topology
from gimbal.core.placement.planner import ModelFacts, planner_for
from gimbal.vllm_plugin.engine.identity import RUN_ID

FACTS = ModelFacts(
    expert_bytes=9_437_184.0,
    top_k=8,
    hidden_bytes=4096.0,
    on_cpu=False,
    all2all_backend="deepep_low_latency",
    step_interval=3000,
)
"""Of Qwen3-30B-A3B, which the packaged GPU profile was fitted to."""
PAIRS_PER_STEP = 1000.0
"""Of one unit of load. vLLM's tests write loads as small whole numbers and mean large batches."""


def pytest_configure(config: pytest.Config) -> None:
    os.environ[RUN_ID] = f"{os.getpid()}-{time.time_ns()}"  # one board for all tests
    if text := os.environ.get("GIMBAL_PEERS"):
        gimbal = parse_config(json.loads(text), "GIMBAL_PEERS")
        swap_schedulers(gimbal)
        swap_policy(gimbal.placement)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """By vLLM's own mark: seconds after each test, for workers that none of these starts."""
    for item in items:
        item.add_marker("skip_global_cleanup")


def swap_schedulers(config: GimbalConfig) -> None:
    """Puts Gimbal in front of both classes that vLLM's tests build."""
    from vllm.v1.core.sched import async_scheduler, scheduler

    from gimbal.vllm_plugin.engine.scheduler import with_gimbal

    ours = with_gimbal(scheduler.Scheduler, config)
    async_scheduler.AsyncScheduler = with_gimbal(async_scheduler.AsyncScheduler, config)
    scheduler.Scheduler = ours


def swap_policy(config: PlacementConfig) -> None:
    """Has ``DefaultEplbPolicy`` answer what Gimbal's placer proposes."""
    from vllm.distributed.eplb.policy.default import DefaultEplbPolicy

    def rebalance_experts(
        cls: type,
        weight: Any,
        num_replicas: int,
        num_groups: int,
        num_nodes: int,
        num_ranks: int,
        old_global_expert_indices: Any = None,
    ) -> Any:
        import torch

        del cls, num_groups  # Gimbal places each expert by itself, whatever its group
        layers, experts = weight.shape
        if old_global_expert_indices is None:
            current = np.tile(np.arange(num_replicas) % experts, (layers, 1))
        else:
            current = old_global_expert_indices.cpu().numpy()
        loads = weight.cpu().numpy() * PAIRS_PER_STEP
        return torch.from_numpy(proposed(config, loads, current, num_nodes, num_ranks))

    DefaultEplbPolicy.rebalance_experts = classmethod(rebalance_experts)


def proposed(
    config: PlacementConfig, loads: np.ndarray, current: np.ndarray, nodes: int, ranks: int
) -> IntArray:
    """[layers, slots] what the placer makes of `current`, neither priced nor gated.

    `loads` [layers, experts] are pairs of one step, summed over sources as vLLM's policy gets
    them: each node asks for an equal part.
    """
    topology = Topology(ranks, current.shape[1] // ranks, ranks // nodes, ranks // nodes)
    counts = RoutingCounts(np.tile(loads / nodes, (nodes, 1, 1)), steps=1)
    decision = planner_for(config, FACTS).decide(counts, topology, current.astype(np.int32))
    return decision.placement.astype(np.int64)
