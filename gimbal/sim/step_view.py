"""A simulated engine before a step, as core's `StepView`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gimbal.core.cost.depth import PrefillDepthCost
from gimbal.core.cost.online import OnlineStepCost
from gimbal.core.queue.budget import (
    NEWCOMERS,
    PrefillCandidate,
    StepCost,
    running_candidate,
    waiting_candidate,
)
from gimbal.core.queue.graph_steps import GraphStepCosts
from gimbal.core.queue.step import UNKNOWN_COST, StepMemory

if TYPE_CHECKING:
    from gimbal.sim.engine import Engine


@dataclass(slots=True)
class Group:
    """What the engines of a lock-step group tell each other before a step.

    Attributes:
        backlog_tokens, decode_tokens: of the engine that has most.
        prefill_share: of their latest steps that prefill.
        base_us: learned time of a step without prefill, of the engine where it is longest.
        depth: learned by all alike.
        graphs: the same; None where steps are never cut.
    """

    backlog_tokens: int = 0
    decode_tokens: int = 0
    prefill_share: float = 0.0
    base_us: float = 0.0
    depth: PrefillDepthCost | None = None
    graphs: GraphStepCosts | None = None


class EngineView:
    """Implements `StepView`; only reads.

    Attributes:
        now_s, held_back: of the coming step, set by the engine.
        learned: what its steps take; None while nothing is learned.
    """

    chunked = True

    def __init__(self, engine: Engine, group: Group) -> None:
        self._engine = engine
        self.group = group
        self.memory = StepMemory()
        self.now_s = 0.0
        self.held_back = False
        self.learned: OnlineStepCost | None = None
        self.block_tokens, self.longest_chunk_tokens = engine.block_tokens, engine.chunk_limit

    @property
    def budget_tokens(self) -> int:
        return self._engine.budget

    @property
    def decoding(self) -> int:
        return self._engine.decodes

    @property
    def decode_tokens(self) -> int:
        return self._engine.decodes

    @property
    def running_requests(self) -> int:
        return len(self._engine.running)

    @property
    def running_prefill_tokens(self) -> int:
        return self._engine.remaining_prefill_tokens

    @property
    def running(self) -> Sequence[PrefillCandidate]:
        engine, now_s = self._engine, self.now_s
        if not engine.prefilling:
            return ()
        return [
            running_candidate(r.entry, engine.waiting, now_s, r.target - r.computed, strict=False)
            for r in engine.prefilling
        ]

    @property
    def may_yield(self) -> bool:
        return self.memory.may_yield(self._engine.step)

    @property
    def newcomers(self) -> Sequence[PrefillCandidate]:
        engine = self._engine
        seats = engine.seats - len(engine.running)
        if seats <= 0 or not engine.waiting:
            return ()
        free, found = engine.free_blocks(), []
        if engine.running:
            free -= engine.kept_blocks
        for entry in engine.waiting.first(min(seats, NEWCOMERS)):
            free -= engine.own_blocks(entry.item)
            if free < 0:
                break
            if entry.item.loads:  # nobody yields to what is not computed
                continue
            found.append(waiting_candidate(entry, strict=False))
        return found

    @property
    def backlog_tokens(self) -> int:
        return self._engine.backlog_tokens

    @property
    def group_backlog_tokens(self) -> float:
        return self.group.backlog_tokens

    @property
    def group_decode_tokens(self) -> float:
        return self.group.decode_tokens

    @property
    def group_prefill_share(self) -> float:
        return self.group.prefill_share

    @property
    def cost(self) -> StepCost:
        learned, group = self.learned, self.group
        if learned is None or group.depth is None:
            return UNKNOWN_COST
        next_us = group.depth.us_per_token(self._next_depth_tokens())
        return StepCost(group.base_us, learned.prefill_us_per_token, next_us)

    def _next_depth_tokens(self) -> int:
        """Context before the next token that is prefilled here."""
        engine = self._engine
        if engine.prefilling:
            return max([request.computed for request in engine.prefilling])
        return engine.waiting.head().item.computed if engine.waiting else 0

    @property
    def oldest_wait_us(self) -> float:
        engine = self._engine
        oldest = engine.waiting.oldest()
        since = [r.entry.queued_s for r in engine.prefilling if r.entry is not None]
        if oldest is not None:
            since.append(oldest.queued_s)
        return 1e6 * (self.now_s - min(since, default=self.now_s))

    @property
    def graphs(self) -> GraphStepCosts | None:
        return self.group.graphs
