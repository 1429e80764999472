"""An engine's counters, kept up to date event by event.

`SchedulerSignals` hears of each request's way through the scheduler (accepted, enqueued,
scheduled, preempted, freed) and of each step. A snapshot then costs the same with ten waiting
requests as with ten thousand. What vLLM itself counts in constant time (queue lengths, free
blocks) is read from it; everything else is a running total.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from dataclasses import dataclass
from typing import Any, Protocol

from gimbal.board.clock import now_us
from gimbal.core.contracts import FloatArray
from gimbal.core.snapshot import (
    ACCEPTED_REQUESTS,
    ACCEPTED_TOKENS,
    Field,
    ImplausibleRow,
    mended,
    plausible,
)
from gimbal.vllm_plugin.engine.learning import StepLessons
from gimbal.vllm_plugin.engine.sender import sender_of
from gimbal.vllm_plugin.engine.state import EngineState
from gimbal.vllm_plugin.engine.step_log import StepLog
from gimbal.vllm_plugin.engine.waiting import lacks_prompt

logger = logging.getLogger("vllm.gimbal")

IDLE_INTERVAL_US = 50_000.0
"""An engine without work repeats its snapshot at most this often."""
RECOUNT_STEPS, RECOUNT_STEPS_SPECULATIVE = 256, 8
"""Context tokens are recounted this often: rejected draft tokens and failed KV loads take some
back unseen."""

# Columns of every snapshot: a plain integer finds one in half the time that an enumeration takes.
_SEQUENCE, _TIMESTAMP = int(Field.SEQUENCE), int(Field.TIMESTAMP_US)
_WAITING, _WAITING_TOKENS = int(Field.WAITING_REQUESTS), int(Field.WAITING_PREFILL_TOKENS)
_RUNNING, _RUNNING_PREFILL = int(Field.RUNNING_REQUESTS), int(Field.RUNNING_PREFILL_TOKENS)
_DECODING, _RUNNING_TOKENS = int(Field.DECODING_REQUESTS), int(Field.RUNNING_TOKENS)
_KV_USED, _KV_TOTAL = int(Field.KV_BLOCKS_USED), int(Field.KV_BLOCKS_TOTAL)
_PREEMPTIONS, _PENDING_HITS = int(Field.PREEMPTIONS), int(Field.PENDING_PREFIX_HIT_TOKENS)
_STEP_BASE, _STEP_TOKENS = int(Field.STEP_BASE_US), int(Field.STEP_TOKENS)
_STEP_PREFILL, _IDLE = int(Field.STEP_PREFILL_TOKENS), int(Field.IDLE)
_STEP_DEPTH = int(Field.STEP_PREFILL_DEPTH_TOKENS)
_AWAITED, _LOADED = int(Field.AWAITED_KV_TOKENS), int(Field.LOADED_KV_TOKENS)
_LOADING = int(Field.LOADING_REQUESTS)


class RowSink(Protocol):
    """Takes finished rows, or raises ImplausibleRow: a board's slot, or a socket to its host."""

    def publish(self, row: FloatArray, now_s: float | None = None) -> None: ...


@dataclass(slots=True)
class _Step:
    """A scheduled step whose output has not come back yet."""

    output: Any
    scheduled_us: float
    prefill_tokens: int
    prefill_pairs: float
    decodes: int


class SchedulerSignals:
    """Counters of one engine.

    Args:
        scheduler: vLLM's scheduler; only read, never changed.
        sink: where snapshots go.
        state: what the signals write, and others read; one of their own where None is given.
        epoch: tells this engine process from an earlier one in the same slot.

    Attributes:
        needs_recount: set when an event was missed; the next snapshot starts from a full count.
        taken: requests that reached the scheduler.
        log: takes one record per step, or None.
        by_router: no front end reads acknowledgements, so that routers may (`ROUTER`).
        mended: numbers that no engine can have, left out of a snapshot.
    """

    def __init__(
        self,
        scheduler: Any,
        sink: RowSink,
        state: EngineState | None = None,
        epoch: float | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.sink = sink
        self.state = EngineState(scheduler) if state is None else state
        self.row, self.cost = self.state.row, self.state.cost
        self._lessons = StepLessons(self.state)
        self.needs_recount = self.by_router = False
        self.taken = self.mended = 0
        self.log: StepLog | None = None
        self._waiting = self.state.waiting
        self._running: set[str] = set()
        self._running_tokens = 0
        self._prefilling: dict[str, int] = {}  # prompt tokens still to prefill
        self._prefill_left = 0
        self._preemptions = 0
        self._steps: deque[_Step] = deque()
        self._refused: deque[tuple[int, int]] = deque()  # sender, prompt tokens
        self._last_done_us = 0.0
        self._published = 0
        self._idle_since_us: float | None = None
        self._unsaid = False  # something came or went since the last snapshot
        speculative = bool(scheduler.num_spec_tokens)
        self._recount_steps = RECOUNT_STEPS_SPECULATIVE if speculative else RECOUNT_STEPS
        row, config = self.row, scheduler.scheduler_config
        row[Field.EPOCH] = time.time_ns() // 1000 if epoch is None else epoch
        pool = scheduler.kv_cache_manager.block_pool
        row[Field.KV_BLOCKS_TOTAL] = max(0, pool.num_gpu_blocks - 1)
        row[Field.KV_BLOCK_TOKENS] = scheduler.block_size
        row[Field.STEP_TOKEN_BUDGET] = config.max_num_batched_tokens
        row[Field.MAX_RUNNING_REQUESTS] = scheduler.max_num_active_reqs
        self.publish(now_us())

    # Events of one request, in the order of its life.

    def accepted(self, request: Any) -> None:
        """The engine took a message of a front end: what was sent is now the engine's."""
        if request.request_id in self.scheduler.requests:
            return  # the next chunk of a streaming session; front ends count sessions once
        self._acknowledge(sender_of(request, self.by_router), request.num_prompt_tokens)
        self.taken += 1

    def refused(self, request: Any, prompt_tokens: int) -> None:
        """The engine answered a message itself; for the next snapshot, from any thread."""
        self._refused.append((sender_of(request, self.by_router), prompt_tokens))
        self._unsaid = True

    def enqueued(self, request: Any) -> None:
        """`request` enters the waiting queue."""
        self._unsaid = True
        self._waiting.enter(request)

    def asked(self, request: Any, cached: int, answer: tuple[int | None, bool]) -> None:
        """vLLM asked the KV connector what it can load; see `WaitingRequests.asked`."""
        self._waiting.asked(request, cached, answer)

    def come(self, request: Any) -> None:
        """The load of `request` is over, well or not."""
        self._waiting.come(request)

    def loads_failed(self) -> None:
        """What some loads were to bring has to be computed, of waiting and running requests."""
        self._waiting.failed()
        self._recount_running()

    def updated(self, request_id: str) -> None:
        """A request may have grown in place: the next chunk of a waiting streaming session."""
        request = self.scheduler.requests.get(request_id)
        if request is None or not request.resumable or request_id not in self._waiting:
            return
        self.enqueued(request)

    def preempting(self, request: Any) -> None:
        self._leave_running(request)
        self._preemptions += 1

    def preempted(self, request: Any) -> None:
        self.enqueued(request)

    def stopped(self, request: Any) -> None:
        """A turn of a streaming session ended: the request goes back to waiting."""
        if request.resumable:
            self._leave_running(request)

    def freed(self, request: Any) -> None:
        """`request` is finished, wherever it was."""
        self._unsaid = True
        self._waiting.leave(request.request_id)
        self._leave_running(request)

    # Events of one step.

    def scheduled(self, output: Any) -> None:
        """A step was put together and is about to run: said unless it is what the last one was."""
        now, row = now_us(), self.row
        self._unsaid |= self.needs_recount or self._idle_since_us is not None
        self._idle_since_us = None
        row[_IDLE] = 0.0
        self._waiting.scheduled()
        counts = output.num_scheduled_tokens
        if counts:
            admitted, new_tokens, new_pairs = self._admit(output, counts)
            advanced, more_tokens, more_pairs = self._advance()
            self._running_tokens += output.total_num_scheduled_tokens
            decodes = len(counts) - admitted - advanced
            tokens, pairs = new_tokens + more_tokens, new_pairs + more_pairs
            self._steps.append(_Step(output, now, tokens, pairs, decodes))
        runs = self._steps[0] if self._steps else None
        prefill, pairs, total = 0, 0.0, 0
        if runs is not None:
            prefill, pairs = runs.prefill_tokens, runs.prefill_pairs
            total = runs.output.total_num_scheduled_tokens
        said = row.item(_STEP_PREFILL), row.item(_STEP_TOKENS)
        if self._unsaid or prefill or said != (0.0, total):
            row[_STEP_PREFILL], row[_STEP_TOKENS] = prefill, total
            row[_STEP_DEPTH] = pairs / prefill if prefill else 0.0
            self.publish(now)

    def completing(self) -> None:
        """A step has ended and its result is about to be taken in."""
        self._lessons.look()

    def completed(self, output: Any) -> None:
        """A step's result is in: learn what it took."""
        now = now_us()
        while self._steps:
            step = self._steps.popleft()
            if step.output is output:
                self._learn(step, now)
                break
        self.publish(now)

    def idle(self) -> None:
        """There is nothing to schedule; said at once and with all news, else every interval."""
        now = now_us()
        since = self._idle_since_us
        if since is None or now - since >= IDLE_INTERVAL_US or self._unsaid:
            if self.log is not None and self._idle_since_us is None:
                self.log.flush()
            self._idle_since_us = now
            self.row[[_STEP_PREFILL, _STEP_DEPTH, _STEP_TOKENS, _IDLE]] = 0.0, 0.0, 0.0, 1.0
            self.publish(now)

    def publish(self, now: float) -> None:
        """Completes the row and hands it to the sink."""
        self._unsaid = False
        if self.needs_recount or self._published % self._recount_steps == self._recount_steps - 1:
            self._recount()
        row, scheduler, waiters = self.row, self.scheduler, self._waiting
        lack = waiters.total
        running, waiting = scheduler.get_request_counts()
        decodes = running - len(self._prefilling)
        free_blocks = scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
        while self._refused:
            self._acknowledge(*self._refused.popleft())
        self._published += 1
        row[_SEQUENCE], row[_TIMESTAMP] = self._published, now
        row[_WAITING], row[_WAITING_TOKENS] = waiting, lack.uncached
        row[_RUNNING], row[_RUNNING_PREFILL] = running, self._prefill_left
        row[_DECODING], row[_RUNNING_TOKENS] = decodes, self._running_tokens
        row[_KV_USED] = row.item(_KV_TOTAL) - free_blocks
        row[_PREEMPTIONS], row[_PENDING_HITS] = self._preemptions, lack.cached
        if scheduler.connector is not None:
            row[_AWAITED], row[_LOADED], row[_LOADING] = lack.awaited, lack.loaded, waiters.loads
        row[_STEP_BASE] = self.cost.step_base_us(decodes)
        try:
            self.sink.publish(row, now / 1e6)
        except ImplausibleRow as error:
            # The row's other numbers are still worth telling. A total below zero missed an event.
            totals = lack.uncached, self._prefill_left, self._running_tokens
            self.needs_recount |= min(totals) < 0
            self._left_out(str(error), mended(row))
            self.sink.publish(row, now / 1e6)

    def _left_out(self, what: str, count: int = 1) -> None:
        if not self.mended:
            logger.warning("Gimbal: left out of this engine's snapshots, and counted: %s", what)
        self.mended += count

    def worker_said(self, field: Field, value: float) -> None:
        """What the engine's worker knows about itself; travels with the next snapshot."""
        if plausible(value):
            self.row[field] = value
        else:
            self._left_out(f"{field.name.lower()} is {value:g}, says the worker")

    def close(self) -> None:
        """Lets go of the board, and finishes the log."""
        if self.log is not None:
            self.log.close()
        if close := getattr(self.sink, "close", None):
            close()

    # Bookkeeping.

    def _acknowledge(self, sender: int, prompt_tokens: int) -> None:
        self.row[ACCEPTED_REQUESTS + sender] += 1
        self.row[ACCEPTED_TOKENS + sender] += prompt_tokens

    def _leave_running(self, request: Any) -> None:
        if request.request_id in self._running:
            self._running.remove(request.request_id)
            self._running_tokens -= request.num_computed_tokens
            self._prefill_left -= self._prefilling.pop(request.request_id, 0)

    def _admit(self, output: Any, counts: dict[str, int]) -> tuple[int, int, float]:
        """Moves requests that were scheduled out of waiting.

        Returns how many, their tokens, and their attention pairs (`StepRecord.prefill_pairs`).
        """
        tokens, pairs = 0, 0.0
        resumed = output.scheduled_cached_reqs.resumed_req_ids
        admitted = [*(new.req_id for new in output.scheduled_new_reqs), *resumed]
        self._unsaid |= bool(admitted)
        for request_id in admitted:
            self._waiting.leave(request_id)
            request = self.scheduler.requests[request_id]
            self._running.add(request_id)
            # vLLM has already added this step's tokens to num_computed_tokens.
            chunk = counts[request_id]
            self._running_tokens += request.num_computed_tokens - chunk
            tokens += chunk
            pairs += chunk * (request.num_computed_tokens - chunk / 2)
            if request.is_prefill_chunk:
                left = request.num_tokens - request.num_computed_tokens
                self._prefilling[request_id] = left
                self._prefill_left += left
        return len(admitted), tokens, pairs

    def _advance(self) -> tuple[int, int, float]:
        """Follows running prefills; returns how many got tokens in this step, which, and pairs."""
        moved = tokens = 0
        pairs = 0.0
        for request_id, left in list(self._prefilling.items()):
            request = self.scheduler.requests[request_id]
            still = max(request.num_tokens - request.num_computed_tokens, 0)
            if still == left:
                continue
            moved += 1
            tokens += left - still
            pairs += (left - still) * (request.num_computed_tokens - (left - still) / 2)
            self._prefill_left -= left
            if still and request.is_prefill_chunk:
                self._prefilling[request_id] = still
                self._prefill_left += still
            else:
                del self._prefilling[request_id]
        return moved, tokens, pairs

    def _learn(self, step: _Step, now: float) -> None:
        step_us = now - max(self._last_done_us, step.scheduled_us)
        self._last_done_us = now
        prefill = step.prefill_tokens, step.prefill_pairs
        tokens = step.output.total_num_scheduled_tokens
        self._lessons.learn(step_us, tokens, prefill, step.decodes)
        if self.log is not None:
            self.log.write(self.row, now, step_us, *prefill, step.decodes)

    def _recount(self) -> None:
        """Sets every total from the scheduler itself."""
        self._recount_running()
        if self.needs_recount:
            self._waiting.recount()
        self.needs_recount = False

    def _recount_running(self) -> None:
        running = {request.request_id: request for request in self.scheduler.running}
        self._running = set(running)
        self._running_tokens = sum(r.num_computed_tokens for r in running.values())
        self._prefilling = {
            request_id: request.num_tokens - request.num_computed_tokens
            for request_id, request in running.items()
            if lacks_prompt(request)
        }
        self._prefill_left = sum(self._prefilling.values())
