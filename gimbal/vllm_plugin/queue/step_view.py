"""vLLM's scheduler before a step, as core's `StepView`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.request import RequestStatus

from gimbal.core.contracts import FloatArray
from gimbal.core.queue.budget import (
    NEWCOMERS,
    PrefillCandidate,
    StepCost,
    running_candidate,
    waiting_candidate,
)
from gimbal.core.queue.graph_steps import GraphStepCosts
from gimbal.core.queue.step import StepMemory
from gimbal.core.snapshot import Field
from gimbal.vllm_plugin.engine.state import EngineState
from gimbal.vllm_plugin.engine.waiting import lacks_prompt
from gimbal.vllm_plugin.queue.connectors import connector_with_chunks_of_its_own
from gimbal.vllm_plugin.queue.facts import EngineFacts
from gimbal.vllm_plugin.queue.waiting_queue import PLACE, GimbalRequestQueue
from gimbal.vllm_plugin.versions import prefill_interval_of_one

_PLAIN = (RequestStatus.WAITING, RequestStatus.PREEMPTED)


class SchedulerView:
    """Implements `StepView`; only reads, and looks each thing up when it is asked for.

    Args:
        scheduler: vLLM's scheduler.
        queue: its waiting queue.
        facts: see `EngineFacts`.
        state: the engine's row, learned costs and group.
        memory: of the steps before.

    Attributes:
        connector: name of a KV connector that chunks are left to vLLM for; mostly empty.
        step: scheduling passes so far.
        prefills: requests behind the last `running`, in its order.
    """

    def __init__(
        self,
        scheduler: Any,
        queue: GimbalRequestQueue,
        facts: EngineFacts,
        state: EngineState,
        memory: StepMemory,
    ) -> None:
        self.scheduler = scheduler
        self.queue = queue
        self.facts = facts
        self.state = state
        self.memory = memory
        self.step = 0
        self.prefills: list[Any] = []
        self.block_tokens = int(scheduler.block_size)
        self.chunked = bool(scheduler.scheduler_config.enable_chunked_prefill)
        self._throttled = False
        self._rows: FloatArray | None = None
        self.connector = connector_with_chunks_of_its_own(scheduler.vllm_config)
        # Where a chunk's end matters to the model or to who carries its KV cache, or whether a
        # request can start is not vLLM's alone to say, chunks stay vLLM's.
        self.can_share = not (
            scheduler.need_mamba_block_aligned_split
            or self.connector
            or scheduler.lora_config
            or scheduler.is_encoder_decoder
        )
        self._may_cut = self.can_share and _may_cut_steps(scheduler.vllm_config)

    def begin(self, throttled: bool) -> None:
        """Starts a scheduling pass; `throttled` is vLLM's own argument."""
        self.step += 1
        self._throttled = throttled
        self._rows = None

    @property
    def nothing_to_prefill(self) -> bool:
        """No running prompt, and none that waits for which there is a seat: nothing to decide."""
        scheduler = self.scheduler
        if scheduler._inflight_prefills:
            return False
        if len(scheduler.running) >= scheduler.max_num_active_reqs:
            return True
        return not (self.queue or scheduler.kv_holding_waiting)

    @property
    def budget_tokens(self) -> int:
        return int(self.scheduler.max_num_scheduled_tokens)

    @property
    def held_back(self) -> bool:
        """By the group's interval, or by that of an engine which is alone."""
        scheduler = self.scheduler
        if scheduler.prefill_capacity_bound:
            return False
        interval = prefill_interval_of_one(scheduler)
        if self._throttled or interval <= 1:
            return self._throttled
        return bool(scheduler.num_executed_steps + 1 - scheduler.last_prefill_step < interval)

    @property
    def decoding(self) -> int:
        scheduler = self.scheduler
        prefills = scheduler._inflight_prefills
        if scheduler.connector is not None:  # loads are counted among them
            prefills = [r for r in prefills if r.status == RequestStatus.RUNNING]
        return len(scheduler.running) - len(prefills)

    @property
    def decode_tokens(self) -> int:
        """Tokens that vLLM will schedule in this step for running requests past their prompt.

        By vLLM's own expression, so that drafts that were not made and requests that it skips
        (their last token is in flight, or pipeline stages take turns) reserve nothing.
        """
        step, tokens = self.scheduler.current_step + 1, 0
        for r in self.scheduler.running:
            if lacks_prompt(r) or step < r.next_decode_eligible_step:
                continue
            in_flight = r.num_output_placeholders
            last = r.num_prompt_tokens + r.max_tokens
            if in_flight and r.num_computed_tokens + 2 - in_flight >= last:
                continue
            tokens += max(0, r.num_tokens_with_spec + in_flight - r.num_computed_tokens)
        return tokens

    @property
    def running_requests(self) -> int:
        return len(self.scheduler.running)

    @property
    def running_prefill_tokens(self) -> int:
        return self.facts.running_prefill_tokens()

    @property
    def running(self) -> Sequence[PrefillCandidate]:
        scheduler = self.scheduler
        if not self.can_share or not scheduler._inflight_prefills:
            return ()
        self.prefills = [
            r for r in scheduler.running if r.is_prefill_chunk and not r.has_encoder_inputs
        ]
        return self._candidates(self.prefills)

    @property
    def may_yield(self) -> bool:
        return self.memory.may_yield(self.step)

    @property
    def newcomers(self) -> Sequence[PrefillCandidate]:
        scheduler = self.scheduler
        if scheduler._pause_state != PauseState.UNPAUSED:
            return ()
        come = self._come()
        if not (come or len(self.queue)):
            return ()
        seats = scheduler.max_num_active_reqs - scheduler.num_waiting_for_streaming_input
        seats -= len(scheduler.running) + len(come)
        if seats <= 0:
            return come
        facts, strict = self.facts, self._strict()
        free = facts.free_blocks() - facts.kept_blocks()
        for entry in self.queue.heap.first(min(seats, NEWCOMERS)):
            request = entry.item
            if request.status not in _PLAIN or facts.loads(request):
                continue  # of what is loaded nothing is computed in this step
            free -= facts.own_blocks(request, free)
            if free < 0:
                break
            come.append(waiting_candidate(entry, strict))
        return come

    def _come(self) -> list[PrefillCandidate]:
        """Requests whose KV has come, which vLLM admits before all others."""
        scheduler = self.scheduler
        ids = scheduler.finished_recving_kv_req_ids
        if not ids:
            return []
        return self._candidates([r for r in map(scheduler.requests.get, ids) if r is not None])

    def _candidates(self, requests: Sequence[Any]) -> list[PrefillCandidate]:
        """The claims of those that have left the queue: by the keys they had there."""
        heap, now_s, strict = self.queue.heap, self.queue.clock(), self._strict()
        return [
            running_candidate(
                getattr(r, PLACE, None),
                heap,
                now_s,
                max(1, r.num_tokens - r.num_computed_tokens),
                strict,
            )
            for r in requests
        ]

    @property
    def longest_chunk_tokens(self) -> int:
        """The most tokens of one prompt that vLLM schedules in a step in which others wait."""
        scheduler = self.scheduler
        threshold = int(scheduler.scheduler_config.long_prefill_token_threshold)
        if threshold > 0 and getattr(scheduler, "adaptive_long_prefill_threshold", False):
            whole = int(scheduler.scheduler_config.max_num_batched_tokens)
            threshold = max(threshold, whole // max(1, sum(scheduler.get_request_counts())))
        return max(0, threshold)

    @property
    def backlog_tokens(self) -> int:
        loading = self.state.waiting.loading_uncached()
        return self.queue.heap.waiting_tokens + loading + self.facts.running_prefill_tokens()

    @property
    def group_backlog_tokens(self) -> float:
        rows = self._group_rows()
        if rows is None:
            facts, published = self.facts, self.facts.field(Field.WAITING_PREFILL_TOKENS)
            waiting = max(published, self.queue.heap.waiting_tokens)
            return int(waiting) + facts.running_prefill_tokens()
        waiting, running = Field.WAITING_PREFILL_TOKENS, Field.RUNNING_PREFILL_TOKENS
        return float((rows[:, waiting] + rows[:, running]).max())

    @property
    def group_decode_tokens(self) -> float:
        """As published; 1 at least where an engine of the group is not heard: it may decode."""
        rows = self._group_rows()
        if rows is None:
            return float(self.state.unseen)
        now = rows[:, Field.STEP_TOKENS] - rows[:, Field.STEP_PREFILL_TOKENS]
        unheard = not rows[:, Field.SEQUENCE].all()
        return float(max(rows[:, Field.DECODING_REQUESTS].max(), now.max(), unheard))

    @property
    def group_prefill_share(self) -> float:
        return self.state.prefill_share

    @property
    def cost(self) -> StepCost:
        facts, rows = self.facts, self._group_rows()
        base_us = facts.field(Field.STEP_BASE_US)
        if rows is not None:
            base_us = max(base_us, float(rows[:, Field.STEP_BASE_US].max()))
        next_us = self.state.depth.us_per_token(self._next_depth_tokens())
        return StepCost(base_us, facts.field(Field.PREFILL_US_PER_TOKEN), next_us)

    def _next_depth_tokens(self) -> int:
        """Context before the next token that is prefilled here."""
        running = self.scheduler._inflight_prefills
        if running:
            return max([int(request.num_computed_tokens) for request in running])
        heap = self.queue.heap
        lack = self.state.waiting.get(heap.head().item.request_id) if len(heap) else None
        return 0 if lack is None else lack.cached

    @property
    def oldest_wait_us(self) -> float:
        scheduler, now_s = self.scheduler, self.queue.clock()
        oldest = self.queue.heap.oldest()
        since_s = now_s if oldest is None else oldest.queued_s
        for request in scheduler.running if scheduler._inflight_prefills else ():
            entry = getattr(request, PLACE, None) if request.is_prefill_chunk else None
            if entry is not None and entry.queued_s < since_s:
                since_s = entry.queued_s
        return 1e6 * max(0.0, now_s - since_s)

    @property
    def graphs(self) -> GraphStepCosts | None:
        return self.state.graph_costs if self._may_cut else None

    def _group_rows(self) -> FloatArray | None:
        """[engines, ROW_WIDTH] of the lock-step group, read once per pass; None without one."""
        if self._rows is None and self.state.group is not None:
            self._rows = self.state.group.read()
        return self._rows

    def _strict(self) -> bool:
        """Whether a priority class always goes before the next."""
        by_priority = self.scheduler.policy == SchedulingPolicy.PRIORITY
        return by_priority and not self.queue.heap.priority_tokens


def _may_cut_steps(vllm_config: Any) -> bool:
    """Whether a step may be cut to what a CUDA graph covers, as far as the configuration says."""
    scheduler, parallel = vllm_config.scheduler_config, vllm_config.parallel_config
    return bool(
        # A step cut short could for ever be too short for a whole prompt or image,
        scheduler.enable_chunked_prefill
        and not vllm_config.model_config.supports_multimodal_inputs
        # what is left would wait for the interval's next step,
        and scheduler.prefill_schedule_interval == 1
        # several steps run at once, a rank has but a part of the tokens, or a step of half the
        # size is split in two and runs without graphs.
        and parallel.pipeline_parallel_size == 1
        and parallel.prefill_context_parallel_size == 1
        and not parallel.use_ubatching
    )
