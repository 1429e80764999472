"""What one engine knows of itself: written by its signals, read by its queue and its front ends."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from gimbal.board.slots import BoardReader
from gimbal.core.contracts import FloatArray
from gimbal.core.cost.depth import PrefillDepthCost
from gimbal.core.cost.online import OnlineStepCost
from gimbal.core.queue.graph_steps import GraphStepCosts
from gimbal.core.snapshot import ROW_WIDTH
from gimbal.vllm_plugin.engine.waiting import WaitingRequests


def graph_tokens(vllm_config: Any) -> int:
    """Tokens of the largest step with prefill that vLLM replays a CUDA graph for; 0 without any.

    As configured: where a worker captures fewer, measured steps show no difference.
    """
    compilation = vllm_config.compilation_config
    mode = compilation.cudagraph_mode
    if mode is None or not mode.mixed_mode().value:
        return 0
    return int(compilation.max_cudagraph_capture_size or 0)


class Control(Protocol):
    """Where an engine reads what an operator switched: a `Board`, or its stand-in on another host
    than the front end's. Nothing here raises or waits."""

    generation: int

    def control_version(self) -> int:
        """Changes with the message."""

    def read_control(self) -> dict[str, Any]:
        """The newest message; empty when there is none."""


class EngineState:
    """One engine's row, learned costs and view of its group.

    Args:
        scheduler: vLLM's scheduler; only read.
        control: what the queue follows; None where nobody can switch it.
        group: rows of the engines in lock step with this one, itself included; None without them.

    Attributes:
        row: [ROW_WIDTH] the snapshot under construction.
        cost: what a step of this engine takes.
        depth: what a prefill token takes by the context before it.
        prefill_share: of the group's latest steps that prefill (`budget.smoothed_share`).
        unseen: it steps with engines of which it knows nothing.
        graph_costs: what steps with and without CUDA graphs take; None where vLLM uses none.
        waiting: what every waiting request lacks.
    """

    def __init__(
        self, scheduler: Any, control: Control | None = None, group: BoardReader | None = None
    ) -> None:
        self.control = control
        self.group = group
        self.row: FloatArray = np.zeros(ROW_WIDTH)
        budget_tokens = scheduler.scheduler_config.max_num_batched_tokens
        self.cost = OnlineStepCost(budget_tokens)
        self.depth = PrefillDepthCost(budget_tokens)
        self.prefill_share = 0.0
        graph = graph_tokens(scheduler.vllm_config)
        alone = scheduler.vllm_config.parallel_config.data_parallel_size == 1
        self.unseen = not alone and group is None
        self.graph_costs = GraphStepCosts(graph) if graph and not self.unseen else None
        self.waiting = WaitingRequests(scheduler)

    def forget(self) -> None:
        """Nothing here can be trusted any more: readers see an engine that knows nothing."""
        self.row[:] = 0.0
        self.waiting.clear()
        self.graph_costs = None
        self.group = None
