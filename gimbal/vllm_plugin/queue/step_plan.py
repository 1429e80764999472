"""The prefill budget of one step: from vLLM's scheduler to core's decision and back."""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.request import RequestStatus

from gimbal.board.slots import BoardReader
from gimbal.core.config import QueueConfig
from gimbal.core.contracts import FloatArray
from gimbal.core.queue.budget import (
    NEWCOMERS,
    PrefillCandidate,
    PrefillSharing,
    StepCost,
    protected_prefill_tokens,
    running_candidate,
    waiting_candidate,
)
from gimbal.core.queue.graph_steps import fits_graph_steps
from gimbal.core.snapshot import Field
from gimbal.vllm_plugin.queue.facts import EngineFacts
from gimbal.vllm_plugin.queue.waiting_queue import PLACE, GimbalRequestQueue

LEAST_TOKENS = 16
"""What the first running prefill gets of a step that decodes fill."""
_PLAIN = (RequestStatus.WAITING, RequestStatus.PREEMPTED)


class StepPlanner:
    """Decides caps for running prefills and the token budget, step by step.

    Args:
        scheduler: vLLM's scheduler; only read, but for whether its prefill interval is lifted.
        queue: its waiting queue.
        group: rows of the engines in lock step with this one, itself included, or None.

    Attributes:
        yields: steps in which a running prefill left budget to newcomers.
        graph_steps: steps whose budget was cut to what a CUDA graph covers.
    """

    def __init__(
        self,
        scheduler: Any,
        config: QueueConfig,
        queue: GimbalRequestQueue,
        facts: EngineFacts,
        group: BoardReader | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.config = config
        self.queue = queue
        self.facts = facts
        self.group = group
        self.yields = 0
        self.graph_steps = 0
        self._cut_to = 0
        self._steps = 0
        self._sharing = PrefillSharing()
        # Where a chunk's end matters to the model, or whether a request can start is not
        # vLLM's alone to say, chunks stay vLLM's.
        self.can_share = not (
            scheduler.need_mamba_block_aligned_split
            or scheduler.connector is not None
            or scheduler.lora_config
            or scheduler.is_encoder_decoder
        )
        self._may_cut = self.can_share and _may_cut_steps(scheduler.vllm_config)

    def caps(self, budget_tokens: int) -> dict[str, int]:
        """Request id -> most prefill tokens in this step, for running prefills.

        They leave what newcomers with smaller keys claim, and one token for every decode: vLLM
        serves its running list in order, and whoever was admitted past a long prefill stands
        behind it there, so that its decode would wait until that prefill is done.

        Args:
            budget_tokens: all tokens of the step.
        """
        scheduler = self.scheduler
        self._steps += 1
        may_yield = self._sharing.begin(self._steps)
        if not self.can_share or not scheduler._inflight_prefills:
            return {}
        running = [r for r in scheduler.running if r.is_prefill_chunk and not r.has_encoder_inputs]
        if not running:
            return {}
        longest = self._longest_chunk(budget_tokens)
        newcomers = self._newcomers(longest) if may_yield and self._somebody_waits() else []
        decode_tokens = self._decode_tokens()
        if not newcomers and not decode_tokens:
            return {}
        now_s = self.queue.clock()
        candidates = [self._running(r, now_s, longest) for r in running]
        left = max(0, budget_tokens - decode_tokens)
        shares = self._sharing.shares(candidates, newcomers, left)
        if not any(shares) and left < LEAST_TOKENS:
            # Where decodes fill the step, the first prefill still moves on.
            first = min(range(len(candidates)), key=lambda index: candidates[index].key)
            shares[first] = min(LEAST_TOKENS, candidates[first].tokens)
        # Caps of a whole chunk do no harm, and hold where vLLM's longest chunk is longer.
        return {r.request_id: s for r, s in zip(running, shares, strict=True) if s < budget_tokens}

    def scheduled(self, tokens: int, budget_tokens: int, capped: bool) -> None:
        """After vLLM has scheduled a step with caps, or with less than its own budget.

        Args:
            tokens: what it scheduled; `budget_tokens`: what it might have.
            capped: `caps` had something to say.
        """
        self.graph_steps += 0 < self._cut_to == tokens
        self._cut_to = 0
        if capped:
            self.yields += self._sharing.claimed
            # When vLLM left tokens unused, nothing is yielded for a while.
            left_over = tokens < budget_tokens and len(self.queue) > 0
            self._sharing.end(self._steps, left_over)

    def deferred(self) -> bool:
        """Whether vLLM schedules no prefill in a step that its interval holds back.

        Under ``interval_backlog_steps`` it is first told when to lift the interval: by the fullest
        engine, for all of them at once.
        """
        scheduler, most_steps = self.scheduler, self.config.interval_backlog_steps
        lifted = bool(scheduler.prefill_capacity_bound)
        if most_steps > 0.0:
            lifted = self._backlog_tokens() > most_steps * scheduler.max_num_scheduled_tokens
            scheduler.prefill_capacity_bound = lifted
        decoding = len(scheduler.running) - len(scheduler._inflight_prefills)
        return decoding > 0 and not lifted

    def held_back(self) -> bool:
        """Whether the scheduler itself holds prefills back in the coming step.

        vLLM 0.33 does so on an engine that is not in lock step with others; 0.32 has no interval
        there.
        """
        scheduler = self.scheduler
        interval = getattr(scheduler, "local_prefill_interval", 1)
        if interval <= 1:
            return False
        return bool(scheduler.num_executed_steps + 1 - scheduler.last_prefill_step < interval)

    def _somebody_waits(self) -> bool:
        """Whether somebody waits whom vLLM could admit."""
        return len(self.queue) > 0 and self.scheduler._pause_state == PauseState.UNPAUSED

    def protected_budget(self, budget_tokens: int) -> int:
        """Tokens of this step under decode protection; at most `budget_tokens`."""
        scheduler, facts = self.scheduler, self.facts
        decoding = len(scheduler.running) - len(scheduler._inflight_prefills)
        decode_tokens = self._decode_tokens()
        # Without chunked prefill a prompt above the budget would stop everybody behind it.
        whole = not scheduler.scheduler_config.enable_chunked_prefill
        if whole or decoding <= 0 or decode_tokens >= budget_tokens:
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

    @property
    def graph_tokens(self) -> int:
        """The step to which prefill may keep for the sake of CUDA graphs; 0: it never does."""
        signals = self.scheduler.gimbal_signals
        costs = None if signals is None else signals.graph_costs
        return int(costs.graph_tokens) if costs is not None and self._may_cut else 0

    def graph_budget(self, budget_tokens: int) -> int:
        """Tokens of this step where a CUDA graph had better cover it; at most `budget_tokens`.

        By the fullest engine of the group, as `protected_budget`, but for what this one took in
        since it published.
        """
        graph = self.graph_tokens
        if not 0 < graph < budget_tokens:
            return budget_tokens
        backlog = self.queue.heap.waiting_tokens + self.facts.running_prefill_tokens()
        decode_tokens = self._decode_tokens()
        if backlog + decode_tokens <= graph:
            return budget_tokens
        most_backlog, most_decodes = backlog, decode_tokens
        if self.group is not None:
            rows = self.group.read()
            most_backlog = max(most_backlog, _backlog(rows).max())
            now = rows[:, Field.STEP_TOKENS] - rows[:, Field.STEP_PREFILL_TOKENS]
            most_decodes = max(most_decodes, rows[:, Field.DECODING_REQUESTS].max(), now.max())
        costs = self.scheduler.gimbal_signals.graph_costs
        fits = fits_graph_steps(most_backlog, most_decodes, graph, self.config.graph_steps)
        if not (most_decodes > 0 and fits and costs.small_steps_pay(most_backlog)):
            return budget_tokens
        self._cut_to = graph
        return graph

    def _decode_tokens(self) -> int:
        """Tokens that vLLM will schedule in this step for running requests past their prompt.

        By vLLM's own expression, so that drafts that were not made and requests that it skips
        (their last token is in flight, or pipeline stages take turns) reserve nothing.
        """
        step, tokens = self.scheduler.current_step + 1, 0
        for r in self.scheduler.running:
            if r.is_prefill_chunk or step < r.next_decode_eligible_step:
                continue
            in_flight = r.num_output_placeholders
            last = r.num_prompt_tokens + r.max_tokens
            if in_flight and r.num_computed_tokens + 2 - in_flight >= last:
                continue
            tokens += max(0, r.num_tokens_with_spec + in_flight - r.num_computed_tokens)
        return tokens

    def _backlog_tokens(self) -> int:
        """Prefill that waits or runs, on the engine of the group that has most.

        As published, this engine's own too: all engines then decide by the same figures.
        """
        if self.group is None:
            facts = self.facts
            waiting = max(facts.field(Field.WAITING_PREFILL_TOKENS), self.queue.heap.waiting_tokens)
            return int(waiting) + facts.running_prefill_tokens()
        return int(_backlog(self.group.read()).max())

    def _longest_chunk(self, budget_tokens: int) -> int:
        """The most tokens of one prompt that vLLM schedules in a step in which others wait."""
        scheduler = self.scheduler
        threshold = int(scheduler.scheduler_config.long_prefill_token_threshold)
        if threshold <= 0:
            return budget_tokens
        if getattr(scheduler, "adaptive_long_prefill_threshold", False):
            whole = int(scheduler.scheduler_config.max_num_batched_tokens)
            threshold = max(threshold, whole // max(1, sum(scheduler.get_request_counts())))
        return min(threshold, budget_tokens)

    def _newcomers(self, longest_tokens: int) -> list[PrefillCandidate]:
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
            found.append(waiting_candidate(entry, longest_tokens, self._strict()))
        return found

    def _running(self, request: Any, now_s: float, longest_tokens: int) -> PrefillCandidate:
        left = request.num_tokens - request.num_computed_tokens
        entry = getattr(request, PLACE, None)
        heap, strict = self.queue.heap, self._strict()
        return running_candidate(entry, heap, now_s, left, longest_tokens, strict)

    def _strict(self) -> bool:
        """Whether a priority class always goes before the next."""
        by_priority = self.scheduler.policy == SchedulingPolicy.PRIORITY
        return by_priority and not self.queue.heap.priority_tokens


def _backlog(rows: FloatArray) -> FloatArray:
    """[engines] prefill tokens that wait or run, of [engines, ROW_WIDTH] snapshots."""
    return rows[:, Field.WAITING_PREFILL_TOKENS] + rows[:, Field.RUNNING_PREFILL_TOKENS]


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
