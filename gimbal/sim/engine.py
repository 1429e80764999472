"""One DP engine as vLLM schedules it, kept in counters so that a decode step costs O(1).

Running requests first (every decode one token, then prefills in order of admission), then the
waiting queue while token budget, seats and KV blocks last; chunked prefill; paged KV with
preemption of the latest admitted request and recompute; prefix cache (`sim.prefix_cache`). Where
level `queue` is on, `core.queue.step` decides about each step's prefill, as on a server. With
prefill and decode apart, engines are those of `sim.roles`.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np

from gimbal.core.config import QueueConfig
from gimbal.core.contracts import NO_TRAITS, QueuedRequest, QueueOrdering, QueueState
from gimbal.core.queue.admission import BlockedHeadGate, next_entry, room_blocks
from gimbal.core.queue.heap import WaitingHeap
from gimbal.core.queue.step import StepDecision, decide, leaves_to_vllm
from gimbal.core.queue.traits import usable
from gimbal.sim.loads import Loads
from gimbal.sim.prefix_cache import PrefixCache
from gimbal.sim.requests import NEVER, SimRequest, StepBatch
from gimbal.sim.step_view import EngineView, Group

PLAIN = usable(QueueConfig(), NO_TRAITS)
"""Section `queue` under an ordering that can order and nothing else, as vLLM's own."""


class Engine:
    """State of one DP engine.

    Args:
        index: DP rank.
        budget: max_num_batched_tokens.
        seats: max_num_seqs.
        blocks: KV blocks in the pool.
        block_tokens: tokens of a block.
        ordering: order of the waiting queue.
        prefix_caching: whether computed prompts can be found again.
        chunk_limit: long_prefill_token_threshold; 0 is none.
        domains: number of routing domains tokens are counted by.
        queue: section `queue`, less what the ordering cannot do (`core.queue.traits.usable`).
        group: what the engines in lock step tell each other before a step.
    """

    role = ""  # with prefill and decode apart, which of them

    def __init__(
        self,
        index: int,
        budget: int,
        seats: int,
        blocks: int,
        block_tokens: int,
        ordering: QueueOrdering,
        prefix_caching: bool = True,
        chunk_limit: int = 0,
        domains: int = 1,
        queue: QueueConfig = PLAIN,
        group: Group | None = None,
    ) -> None:
        self.index, self.budget, self.seats = index, budget, seats
        self.block_tokens, self.blocks_total = block_tokens, blocks
        self.chunk_limit = chunk_limit
        self.queue = queue
        self.view = EngineView(self, group or Group())
        self.capacity_bound = False  # the last step that could prefill left somebody waiting
        self.decision = self._whole = StepDecision(budget)  # of the latest step
        self.prefix_caching = prefix_caching
        self.decides = not leaves_to_vllm(queue)
        self.waiting: WaitingHeap[SimRequest] = WaitingHeap(ordering, queue.max_wait_s or None)
        passing = queue.pass_steps > 0
        self._gate = BlockedHeadGate(queue.pass_steps, queue.pass_s) if passing else None
        self.kept_blocks = 0  # KV blocks that admission leaves free in this step
        self._room_blocks = self.blocks_for(queue.room_tokens)  # of them, for one more request
        self._left = 0  # tokens of this step that are not given away yet
        self.running: dict[int, SimRequest] = {}  # by request index, in order of admission
        self.prefilling: list[SimRequest] = []
        self.remaining_prefill_tokens = 0  # of `prefilling`
        self.decodes = 0
        self.kv_tokens = 0  # context tokens of decodes
        self.used_blocks = 0  # blocks of running requests, loads and prompts to be handed over
        self.loads = Loads()
        self.preemptions = 0
        self.step = 0
        self.served_prefill_tokens = 0
        self.accepted_requests = 0
        self.accepted_tokens = 0
        self.prefill_rate = 0.0  # tokens/s, smoothed
        self.domain_decodes = np.zeros(domains)
        self.domain_tokens = np.zeros(domains)  # of the step being run
        self._phase = [0] * block_tokens
        self._finish: list[tuple[int, int, SimRequest, int]] = []
        self._cache: PrefixCache | None = None
        self._admissions = 0

    # -- arrival -----------------------------------------------------------------------------

    def add(self, request: SimRequest, now_s: float) -> None:
        """A request reaches the engine's waiting queue."""
        request.target = request.prompt_tokens
        self._look_up(request)
        self.accepted_requests += 1
        self.accepted_tokens += request.prompt_tokens
        queued = QueuedRequest(
            request.request_id,
            now_s,
            self._lacking(request),
            served_before_tokens=self.served_prefill_tokens,
        )
        request.entry = self.waiting.add(queued, request, self._queue_state(now_s))

    def _lacking(self, request: SimRequest) -> int:
        """Tokens that a request has to compute here when it is queued."""
        return request.prompt_tokens - request.computed

    def _queue_state(self, now_s: float) -> QueueState:
        return QueueState(
            now_s=now_s,
            prefill_tokens_per_s=self.prefill_rate,
            waiting_requests=len(self.waiting),
            waiting_tokens=self.waiting.waiting_tokens,
            served_tokens=self.served_prefill_tokens,
        )

    def _look_up(self, request: SimRequest) -> None:
        """What the prefix cache holds of a waiting request needs no computing."""
        found = 0
        if self._cache is not None and request.prefix_blocks:
            found = self._cache.found_tokens(request)
        request.computed = found

    @property
    def waiting_requests(self) -> int:
        """All that do not run: those in the queue and those that load."""
        return len(self.waiting) + len(self.loads.held)

    @property
    def backlog_tokens(self) -> int:
        """Prefill that waits or runs."""
        return self.waiting.waiting_tokens + self.remaining_prefill_tokens

    # -- one step ----------------------------------------------------------------------------

    def schedule(self, now_s: float, due: bool = True) -> StepBatch:
        """Chooses this step's batch.

        Args:
            due: False where ``--prefill-schedule-interval`` holds prefill beside decodes back.
        """
        batch = StepBatch()
        preemptions = self.preemptions
        self.domain_tokens[:] = self.domain_decodes
        self._grow_decodes()
        batch.decodes, batch.kv_tokens = self.decodes, self.kv_tokens
        decision = self.decision = self._decide(now_s, due)
        if decision.admit:
            self._left = decision.budget_tokens - self.decodes
            if self.prefilling:
                self._continue_prefills(decision.caps, batch)
            if self.waiting_requests and self.preemptions == preemptions:  # else no room, says vLLM
                self._admit_waiting(now_s, batch)
            self.capacity_bound = self.waiting_requests > 0
            if decision is not self._whole:
                given = decision.budget_tokens - self._left
                self.view.memory.ended(self.step, decision, given, self.capacity_bound)
        self.step += 1
        return batch

    def _continue_prefills(self, caps: Sequence[int] | None, batch: StepBatch) -> None:
        """Running prefills go on in order of admission, each within its cap.

        Caps may give the first one `step.LEAST_TOKENS` where decodes fill the step. vLLM then lets
        the last decodes wait; here the step has so many tokens more.
        """
        for number, request in enumerate(list(self.prefilling)):
            most = self._left if caps is None else caps[number]
            if request.index in self.running and most > 0:  # not preempted by an earlier one
                self._left -= self._prefill(request, most, batch)

    def _admit_waiting(self, now_s: float, batch: StepBatch) -> None:
        """Waiting requests start while tokens, seats and KV blocks last."""
        if self.waiting.is_dynamic:
            self.waiting.refresh(self._queue_state(now_s))
        while self._left > 0 and len(self.running) < self.seats and self.waiting:
            entry = next_entry(self.waiting, self._gate, self, self.step, now_s)
            request = entry.item
            free = self.free_blocks()
            if self.blocks_needed(request, free) > free:
                break
            self.waiting.take(entry)
            self.kept_blocks += self._room_blocks
            if self._gate is not None:
                self._gate.forget(request.request_id)
            self._start(request, batch)

    def _decide(self, now_s: float, due: bool) -> StepDecision:
        """What this step may do: by the queue level's decision, or by vLLM's own rule."""
        if not (self.decides and (self.prefilling or self.waiting)):
            admit = due or self.capacity_bound or self.decodes == 0
            return self._whole if admit else StepDecision(self.budget, False)
        view = self.view
        self.kept_blocks = room_blocks(view, self.queue.room_tokens)
        view.now_s, view.held_back = now_s, not (due or self.capacity_bound)
        return decide(view, self.queue)

    def free_blocks(self) -> int:
        """KV blocks that can be allocated now."""
        return self.blocks_total - self.used_blocks

    def blocks_needed(self, item: SimRequest, free: int) -> int:
        """KV blocks that must be free before the request is admitted, as on a server.

        All of its prompt (``scheduler_reserve_full_isl``) but what others use already, and beside
        running requests the room that the step's decision leaves them.
        """
        return self.own_blocks(item) + (self.kept_blocks if self.running else 0)

    def own_blocks(self, item: SimRequest) -> int:
        """KV blocks of all that is to be prefilled, but those that others use already.

        What it found when it was queued may have been evicted since.
        """
        self._look_up(item)
        blocks = self.blocks_for(item.target)
        if item.computed and self._cache is not None:
            blocks -= self._cache.shared_blocks(item)
        return blocks

    def _chunk(self, request: SimRequest, budget: int) -> int:
        chunk = min(request.target - request.computed, budget)
        return min(chunk, self.chunk_limit) if self.chunk_limit else chunk

    def blocks_for(self, tokens: int) -> int:
        """KV blocks that hold `tokens`."""
        return -(-tokens // self.block_tokens)

    def _start(self, request: SimRequest, batch: StepBatch) -> None:
        """A waiting request runs, with as many tokens as the step has left."""
        self._run(request)
        self._take_found(request)
        self._left -= self._prefill(request, self._left, batch)

    def _run(self, request: SimRequest) -> None:
        self._admissions += 1
        request.admitted = self._admissions
        self.running[request.index] = request
        self.prefilling.append(request)
        self.remaining_prefill_tokens += request.target - request.computed

    def _take_found(self, request: SimRequest) -> None:
        """KV blocks of what the prefix cache holds of it."""
        if self._cache is not None and request.prefix_blocks:
            self.used_blocks += self._cache.take(request)
            self.used_blocks += self.blocks_for(request.computed) - request.shared_blocks

    def _prefill(self, request: SimRequest, budget: int, batch: StepBatch) -> int:
        """Gives `request` its chunk; returns the tokens taken (0 when blocks ran out)."""
        chunk = self._chunk(request, budget)
        before = request.computed
        grown = self.blocks_for(before + chunk) - self.blocks_for(before)
        while self.used_blocks + grown > self.blocks_total:
            if self._preempt(batch) is request:
                return 0
        self.used_blocks += grown
        request.computed = before + chunk
        self.remaining_prefill_tokens -= chunk
        self.served_prefill_tokens += chunk
        self.domain_tokens[request.domain] += chunk
        batch.prefill_tokens += chunk
        batch.prefill_pairs += chunk * (before + chunk / 2)
        batch.prefill_kv_tokens += before
        if self._cache is not None:
            self._cache.shrink(self.blocks_total - self.used_blocks)
            self._cache.computed(request)
        if request.computed == request.target:
            batch.completed.append(request)
            self.prefilling.remove(request)
        return chunk

    def _grow_decodes(self) -> None:
        """Allocates the blocks that this step's decodes open, preempting when none is left."""
        while True:
            opened = self._phase[-self.step % self.block_tokens]
            if self.used_blocks + opened <= self.blocks_total:
                self.used_blocks += opened
                if self._cache is not None:
                    self._cache.shrink(self.blocks_total - self.used_blocks)
                return
            self._preempt(None)

    def _preempt(self, batch: StepBatch | None) -> SimRequest:
        """Frees the latest admitted request for recompute, as vLLM does.

        Args:
            batch: the step's batch when its decodes already hold this step's blocks: a decode
                that is preempted now leaves the batch and returns that block too.
        """
        victim = self.running.pop(next(reversed(self.running)))
        if victim.decode_from_step == NEVER:
            self._free(victim, victim.computed)
            if victim in self.prefilling:
                self.prefilling.remove(victim)
                self.remaining_prefill_tokens -= victim.target - victim.computed
        else:
            context = victim.computed + self.step - victim.decode_from_step
            if batch is not None:
                self.used_blocks -= self.blocks_for(context + 1) - self.blocks_for(context)
                batch.decodes -= 1
                batch.kv_tokens -= context + 1
            self._leave_decode(victim)
        victim.computed = 0
        victim.target = victim.prompt_tokens + victim.generated
        victim.preemptions += 1
        self.preemptions += 1
        assert victim.entry is not None
        self.waiting.restore(victim.entry, front=True)
        return victim

    # -- end of a step -----------------------------------------------------------------------

    def finish_step(self, batch: StepBatch, end_us: float) -> list[SimRequest]:
        """Advances decodes by one token and prompts that are done to decode; returns finished."""
        finished: list[SimRequest] = []
        self.kv_tokens += self.decodes
        while self._finish and self._finish[0][0] <= self.step:
            _, _, request, admission = heapq.heappop(self._finish)
            if request.admitted == admission and request.decode_from_step != NEVER:
                self._leave_decode(request)
                del self.running[request.index]
                self._retire(request, end_us)
                finished.append(request)
        for request in batch.completed:
            if request.index not in self.running:  # preempted within the step
                continue
            if request.generated == 0:
                request.first_token_us = end_us
            request.generated += 1
            if request.generated >= request.output_tokens:
                del self.running[request.index]
                self._end_prompt(request, end_us)
                finished.append(request)
            else:
                self._enter_decode(request)
        return finished

    def _enter_decode(self, request: SimRequest) -> None:
        request.decode_from_step = self.step
        context = request.computed + 1
        self.decodes += 1
        self.kv_tokens += context
        self.domain_decodes[request.domain] += 1
        # A decode at step s holds computed + s - step tokens; it opens a block when that count,
        # before the new token, is a multiple of the block size.
        self._phase[(request.computed - self.step) % self.block_tokens] += 1
        due = self.step + request.output_tokens - request.generated
        heapq.heappush(self._finish, (due, request.index, request, request.admitted))

    def _leave_decode(self, request: SimRequest) -> None:
        done = self.step - request.decode_from_step
        request.generated += done
        self.decodes -= 1
        self.kv_tokens -= request.computed + 1 + done
        self.domain_decodes[request.domain] -= 1
        self._phase[(request.computed - request.decode_from_step) % self.block_tokens] -= 1
        self._free(request, request.computed + done)
        request.decode_from_step = NEVER

    def _free(self, request: SimRequest, tokens: int) -> None:
        """Gives back the KV blocks of a request with `tokens` of context."""
        self.used_blocks -= self.blocks_for(tokens) - request.shared_blocks
        if request.held and self._cache is not None:
            self.used_blocks -= self._cache.release(request)

    def _end_prompt(self, request: SimRequest, end_us: float) -> None:
        """A request that is over with its prompt."""
        self._free(request, request.computed)
        self._retire(request, end_us)

    def _retire(self, request: SimRequest, end_us: float) -> None:
        request.last_token_us = end_us
        if self._cache is not None and request.answered_blocks:
            self._cache.answered(request)

    def transferred(self, request: SimRequest) -> None:
        """The KV of a prompt has been read from here, or has come (`sim.roles`)."""
        raise NotImplementedError

    def set_prefix_block_tokens(self, tokens: int) -> None:
        """Tokens one entry of ``prefix_blocks`` stands for; 0 where no prompt has any."""
        if tokens and self.prefix_caching:
            self._cache = PrefixCache(self.block_tokens, tokens)

    @property
    def busy(self) -> bool:
        return bool(self.running) or self.waiting_requests > 0
