"""The prefill budget of one step: from vLLM's scheduler to core's decision and back."""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.request import RequestStatus

from gimbal.core.config import QueueConfig
from gimbal.core.contracts import Field
from gimbal.core.queue.budget import (
    PrefillCandidate,
    StepCost,
    protected_prefill_tokens,
    share_prefill_budget,
)
from gimbal.core.queue.heap import FRONT, Entry
from gimbal.vllm_plugin.board_slots import BoardReader
from gimbal.vllm_plugin.engine_facts import EngineFacts
from gimbal.vllm_plugin.waiting_queue import PLACE, GimbalRequestQueue

NEWCOMERS = 16
"""Waiting requests that may claim a running prefill's budget in one step."""
HOLD_STEPS = 8
"""Steps without yielding after one in which vLLM did not admit whom a prefill yielded to."""
_CLASS_TOKENS = 1e12
"""Key distance between priority classes, and between them and who must not wait any longer."""
_PLAIN = (RequestStatus.WAITING, RequestStatus.PREEMPTED)


class StepPlanner:
    """Decides caps for running prefills and the token budget, step by step.

    Args:
        scheduler: vLLM's scheduler; only read.
        queue: its waiting queue.
        group: rows of the engines in lock step with this one, itself included, or None.
        rank: this engine's row there.
    """

    def __init__(
        self,
        scheduler: Any,
        config: QueueConfig,
        queue: GimbalRequestQueue,
        facts: EngineFacts,
        group: BoardReader | None = None,
        rank: int = 0,
    ) -> None:
        self.scheduler = scheduler
        self.config = config
        self.queue = queue
        self.facts = facts
        self.group = group
        self.rank = rank
        self.yields = 0
        self._steps = 0
        self._hold_until = 0
        # Where a chunk's end matters to the model, or whether a request can start is not
        # vLLM's alone to say, chunks stay vLLM's.
        self.can_share = not (
            scheduler.need_mamba_block_aligned_split
            or scheduler.connector is not None
            or scheduler.lora_config
            or scheduler.is_encoder_decoder
        )

    def caps(self, budget_tokens: int) -> dict[str, int]:
        """Request id -> most prefill tokens in this step, for running prefills that yield.

        Args:
            budget_tokens: all tokens of the step.
        """
        scheduler = self.scheduler
        self._steps += 1
        if not self.can_share or not scheduler._inflight_prefills or not len(self.queue):
            return {}
        if self._steps < self._hold_until or scheduler._pause_state != PauseState.UNPAUSED:
            return {}
        newcomers = self._newcomers()
        if not newcomers:
            return {}
        now_s = self.queue.clock()
        running = [r for r in scheduler.running if r.is_prefill_chunk and not r.has_encoder_inputs]
        candidates = [self._running(r, now_s) for r in running]
        left = budget_tokens - self._decode_tokens(len(scheduler.running) - len(running))
        shares = share_prefill_budget(candidates, newcomers, left)
        return {
            request.request_id: share
            for request, candidate, share in zip(running, candidates, shares, strict=True)
            if share < candidate.tokens
        }

    def yielded(self, scheduled_tokens: int, budget_tokens: int) -> None:
        """After a step with caps: when vLLM left tokens unused, nothing is yielded for a while."""
        self.yields += 1
        if scheduled_tokens < budget_tokens and len(self.queue):
            self._hold_until = self._steps + HOLD_STEPS

    def protected_budget(self, budget_tokens: int) -> int:
        """Tokens of this step under decode protection; at most `budget_tokens`."""
        scheduler, facts = self.scheduler, self.facts
        decoding = len(scheduler.running) - len(scheduler._inflight_prefills)
        decode_tokens = self._decode_tokens(decoding)
        if decoding <= 0 or decode_tokens >= budget_tokens:
            return budget_tokens
        prefill_tokens = protected_prefill_tokens(
            StepCost(facts.field(Field.STEP_BASE_US), facts.field(Field.PREFILL_US_PER_TOKEN)),
            budget_tokens - decode_tokens,
            decoding,
            self._backlog_tokens(),
            tpot_factor=self.config.tpot_factor,
            patience_steps=self.config.patience_steps,
            min_tokens=scheduler.block_size,
        )
        return decode_tokens + prefill_tokens

    def _decode_tokens(self, decoding: int) -> int:
        return decoding * (1 + int(self.scheduler.num_spec_tokens))

    def _backlog_tokens(self) -> int:
        """Prefill that waits or runs, on the engine of the group that has most."""
        facts = self.facts
        own = facts.field(Field.WAITING_PREFILL_TOKENS) + facts.running_prefill_tokens()
        if self.group is None:
            return int(own)
        rows = self.group.read()
        backlog = rows[:, Field.WAITING_PREFILL_TOKENS] + rows[:, Field.RUNNING_PREFILL_TOKENS]
        backlog[self.rank] = own
        return int(backlog.max())

    def _newcomers(self) -> list[PrefillCandidate]:
        """Waiting requests, in order, for whom there is a seat and KV space in this step."""
        scheduler = self.scheduler
        seats = scheduler.max_num_active_reqs - scheduler.num_waiting_for_streaming_input
        seats -= len(scheduler.running)
        if seats <= 0:
            return []
        free = self.facts.free_blocks()
        found = []
        for entry in self.queue.heap.first(min(seats, NEWCOMERS)):
            request = entry.item
            if request.status not in _PLAIN:
                continue
            free -= self.facts.blocks_needed(request, free)
            if free < 0:
                break
            tokens = entry.request.uncached_tokens
            found.append(PrefillCandidate(self._key(entry, 0), max(1, tokens)))
        return found

    def _running(self, request: Any, now_s: float) -> PrefillCandidate:
        left = request.num_tokens - request.num_computed_tokens
        entry: Entry[Any] | None = getattr(request, PLACE, None)
        # A key of an ordering that is no longer in force says nothing: that prefill never yields.
        stale = entry is None or entry.epoch != self.queue.heap.epoch
        if entry is None or stale or self._waited_too_long(entry, now_s):
            return PrefillCandidate(-_CLASS_TOKENS * _CLASS_TOKENS, left)
        return PrefillCandidate(
            self._key(entry, max(0, entry.request.uncached_tokens - left)), left
        )

    def _waited_too_long(self, entry: Entry[Any], now_s: float) -> bool:
        limit_s = self.queue.heap.max_wait_s
        return limit_s is not None and now_s - entry.queued_s > limit_s

    def _key(self, entry: Entry[Any], done_tokens: int) -> float:
        """The queue's order as one number: class, preempted ones first, key less what is done."""
        key = entry.key - done_tokens
        if entry.lane == FRONT:
            key -= _CLASS_TOKENS / 2
        strict = self.scheduler.policy == SchedulingPolicy.PRIORITY
        if strict and not self.queue.heap.priority_tokens:
            key += entry.request.priority * _CLASS_TOKENS
        return key
