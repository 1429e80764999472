"""vLLM's ``RequestQueue`` over Gimbal's waiting heap.

The heap orders; this adapter translates. It also keeps every request in a plain dictionary, with
the place that vLLM's own queue would give it. So vLLM's queue can take over at any moment, without
losing a request and in the order that it would have had from the start. It does when the ordering
fails, until the next step, and when the level is switched off.

Replaces ``Scheduler.waiting`` only: ``kv_holding_waiting`` holds requests that already own KV
blocks (asynchronous loads, streaming sessions), which vLLM drains first and in its own order.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from operator import attrgetter
from typing import Any, Protocol

from vllm.v1.core.sched.request_queue import (
    RequestQueue,
    SchedulingPolicy,
    create_request_queue,
)
from vllm.v1.request import Request, RequestStatus

from gimbal.core.contracts import QueuedRequest, QueueOrdering, QueueState
from gimbal.core.guard import LevelGuard
from gimbal.core.queue.admission import BlockedHeadGate, KvRoom, next_entry
from gimbal.core.queue.heap import Entry, WaitingHeap

PLACE = "_gimbal_place"
"""Attribute of a vLLM request that remembers its `Entry`, so that it can return to its place."""
_WAITS = "_gimbal_waits"
"""Attribute of a vLLM request: (place in vLLM's queue, time of queueing in seconds)."""
_vllm_order = attrgetter(_WAITS)


class QueueFacts(KvRoom[Request], Protocol):
    """What the queue asks about its engine; `facts.EngineFacts` answers in a server."""

    def uncached_tokens(self, request: Request) -> int:
        """Prompt tokens that have to be computed for a request that is being queued."""
        ...

    def prefill_tokens_per_s(self) -> float:
        """Measured prefill throughput; 0 while unknown."""
        ...

    def running_prefill_tokens(self) -> int:
        """Prompt tokens that admitted requests still lack."""
        ...

    def keep_more_free(self, blocks: int) -> None:
        """Admission leaves so many KV blocks more free, until the step's end."""
        ...


class GimbalRequestQueue(RequestQueue):  # type: ignore[misc]
    """The waiting queue of one engine.

    Args:
        ordering: the order of waiting requests.
        policy: vLLM's policy; request priorities count only under ``PRIORITY``, and it is the
            queue to fall back to.
        facts: what the queue asks about the engine.
        guard: counts failures.

    Attributes:
        heap: what waits, while Gimbal orders it.
        gate: lets requests pass a head without KV blocks; None where nobody passes.
        room_blocks: KV blocks that admission leaves free for the growth of one request.
        bound_s: the ordering's promise to a newcomer; None where it makes none.
        fallback: vLLM's own queue, while that one orders; None while Gimbal does.
        ours: Gimbal is to order. False once the level is switched off.
    """

    def __init__(
        self,
        ordering: QueueOrdering,
        policy: SchedulingPolicy,
        facts: QueueFacts,
        guard: LevelGuard,
        max_wait_s: float | None = None,
        priority_tokens: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.policy = policy
        self.facts = facts
        self.guard = guard
        self.clock = clock
        self.heap: WaitingHeap[Request] = WaitingHeap(ordering, max_wait_s, priority_tokens)
        self.gate: BlockedHeadGate | None = None
        self.room_blocks = 0
        self.bound_s: Callable[[float, int, float], float] | None = None
        self.passes = 0
        self.served_tokens = 0.0
        self.fallback: RequestQueue | None = None
        self.ours = True
        self._all: dict[str, Request] = {}  # everything that waits
        self._front = self._end = 0  # places given out in vLLM's queue
        self._valid_epoch = 0  # an `Entry` from before belongs to a heap that is gone
        self._offered: Entry[Request] | None = None
        self._peeked: Request | None = None
        self._step = 0
        # What the front end's time of arrival is on this clock.
        self._arrivals_s = clock() - time.time()

    # What vLLM calls.

    def add_request(self, request: Request) -> None:
        self._all[request.request_id] = request
        self._end += 1
        setattr(request, _WAITS, (self._end, self.clock()))
        self._guarded("add_request", self._add, request)

    def pop_request(self) -> Request:
        """Takes the request that was peeked at: vLLM has allocated its blocks by then."""
        if not self._all:
            raise IndexError("pop from an empty waiting queue")
        request: Request | None = None
        if self.fallback is None:
            try:
                request = self._pop()
            except Exception as error:
                self._fall_back(error)
            else:
                self.guard.succeeded("ordering")
        if request is None:
            assert self.fallback is not None
            request = self._peeked
            if request is None:
                request = self.fallback.pop_request()
            else:
                self.fallback.remove_request(request)
        self._peeked = None
        del self._all[request.request_id]
        return request

    def peek_request(self) -> Request:
        offered = self._offered
        if offered is not None:  # within a pass vLLM asks again until something changes
            self._peeked = offered.item
            return offered.item
        if not self._all:
            raise IndexError("peek from an empty waiting queue")
        if self.fallback is None:
            try:
                # Within a pass vLLM pops what it peeked at; every change of the queue asks anew.
                offered = self._offered = self._choose()
            except Exception as error:
                self._fall_back(error)
            else:
                self._peeked = offered.item
                return offered.item
        assert self.fallback is not None
        self._peeked = self.fallback.peek_request()
        return self._peeked

    def prepend_request(self, request: Request) -> None:
        """Puts a request back: a preempted one at the front, a skipped one at its old place."""
        waits = getattr(request, _WAITS, None)
        if waits is None or request.status == RequestStatus.PREEMPTED:
            self._front -= 1
            setattr(request, _WAITS, (self._front, self.clock() if waits is None else waits[1]))
        self._all[request.request_id] = request
        self._guarded("prepend_request", self._prepend, request)

    def prepend_requests(self, requests: Iterable[Request]) -> None:
        for request in requests:
            self.prepend_request(request)

    def remove_request(self, request: Request) -> None:
        if request.request_id not in self._all:
            raise ValueError(f"request {request.request_id!r} is not waiting")
        self._guarded("remove_request", self._remove, request)
        if self._peeked is request:
            self._peeked = None
        del self._all[request.request_id]

    def remove_requests(self, requests: Iterable[Request]) -> None:
        """Removes those that wait here; vLLM passes what may be in its other queue."""
        here = [request for request in requests if request.request_id in self._all]
        if self.fallback is None:
            for request in here:
                self.remove_request(request)
            return
        self.fallback.remove_requests(here)
        for request in here:
            del self._all[request.request_id]
        if self._peeked in here:
            self._peeked = None

    def __bool__(self) -> bool:
        return bool(self._all)

    def __len__(self) -> int:
        return len(self._all)

    def __iter__(self) -> Iterator[Request]:
        requests: Iterator[Request] = self._guarded("__iter__", self._in_order)
        return requests

    # What the queue level calls.

    def state(self) -> QueueState:
        """The engine's condition now."""
        return QueueState(
            now_s=self.clock(),
            prefill_tokens_per_s=self.facts.prefill_tokens_per_s(),
            waiting_requests=len(self.heap),
            waiting_tokens=self.heap.waiting_tokens,
            served_tokens=self.served_tokens,
        )

    def begin_step(self) -> None:
        """Before each scheduling pass: dynamic orderings sort anew.

        An ordering that has failed since the last step gets what waits back.
        """
        self._step += 1
        self._offered = None
        try:
            if self.fallback is not None and self.ours and not self.guard.disabled:
                self._take_back(self.heap.ordering, self.heap.max_wait_s)
            if self.fallback is None and self.heap.is_dynamic:
                self.heap.refresh(self.state())
        except Exception as error:
            self._fall_back(error)

    def use_ordering(self, ordering: QueueOrdering, max_wait_s: float | None) -> None:
        """Switches the ordering; requests keep their age. Raises as the ordering does.

        What waits under vLLM's order waits under `ordering` again.
        """
        self._offered = None
        if self.fallback is None:
            self.heap.reorder(ordering, self.state(), max_wait_s)
        else:
            self._take_back(ordering, max_wait_s)
        self.ours = True

    def resized(self, request: Request) -> None:
        """More or less of `request` has to be computed than was known when it was queued.

        It may have left the queue for a load; its place still says what it competes with.
        """
        entry: Entry[Request] | None = getattr(request, PLACE, None)
        if self.fallback is not None or entry is None or entry.epoch != self.heap.epoch:
            return
        tokens = self.facts.uncached_tokens(request)
        if entry.rank is None:
            self.served_tokens += tokens - entry.request.uncached_tokens
        self._offered = None
        self.heap.resize(entry, tokens, self.state())

    def leave_to_vllm(self) -> RequestQueue:
        """Has vLLM's own queue order from now on, and returns it."""
        self.ours = False
        if self.fallback is None:
            self._hand_over()
        assert self.fallback is not None
        # Its entries hold their requests.
        heap = self.guard.run("heap", self._empty_heap, self.heap.ordering, self.heap.max_wait_s)
        self.heap = self.heap if heap is None else heap
        return self.fallback

    # The heap's side. Each may raise; `_guarded` then hands over to vLLM's queue.

    def _add(self, request: Request) -> None:
        self._offered = None
        state = self.state()
        entry = self._enter(self.heap, request, state)
        setattr(request, PLACE, entry)
        if self.bound_s is not None:
            uncached = entry.request.uncached_tokens
            ahead = self.heap.waiting_tokens - uncached + self.facts.running_prefill_tokens()
            entry.bound_s = self.bound_s(ahead, uncached, state.prefill_tokens_per_s)

    def _enter(
        self, heap: WaitingHeap[Request], request: Request, state: QueueState
    ) -> Entry[Request]:
        by_priority = self.policy == SchedulingPolicy.PRIORITY
        queued = QueuedRequest(
            request_id=request.request_id,
            arrival_s=request.arrival_time + self._arrivals_s if by_priority else state.now_s,
            uncached_tokens=self.facts.uncached_tokens(request),
            priority=request.priority if by_priority else 0,
            served_before_tokens=self.served_tokens,
        )
        return heap.add(queued, request, state)

    def _choose(self) -> Entry[Request]:
        gate = self.gate
        if gate is None:
            return self.heap.peek(self.clock())
        before = gate.passes
        entry = next_entry(self.heap, gate, self.facts, self._step, self.clock())
        self.passes += gate.passes - before
        return entry

    def _pop(self) -> Request:
        entry = self._offered if self._offered is not None else self.heap.peek(self.clock())
        self._offered = None
        request = self.heap.take(entry).item
        entry.item = None  # the request knows its entry: no cycle may outlive the queue
        self.served_tokens += entry.request.uncached_tokens
        if self.room_blocks:
            self.facts.keep_more_free(self.room_blocks)
        if self.gate is not None:
            self.gate.forget(request.request_id)
        return request

    def _prepend(self, request: Request) -> None:
        self._offered = None
        entry: Entry[Request] | None = getattr(request, PLACE, None)
        preempted = request.status == RequestStatus.PREEMPTED
        if entry is None or entry.epoch < self._valid_epoch:
            self._add(request)
            if not preempted:
                return
            entry = self.heap.remove(request.request_id)
        elif not preempted:
            self.served_tokens -= entry.request.uncached_tokens  # it was not served after all
        entry.item = request
        self.heap.restore(entry, front=preempted)

    def _remove(self, request: Request) -> None:
        self._offered = None
        self.heap.remove(request.request_id).item = None
        if self.gate is not None:
            self.gate.forget(request.request_id)

    def _in_order(self) -> Iterator[Request]:
        return iter([entry.item for entry in self.heap])

    def _empty_heap(
        self, ordering: QueueOrdering, max_wait_s: float | None
    ) -> WaitingHeap[Request]:
        """A heap that goes on where the present one has counted to."""
        old = self.heap
        heap: WaitingHeap[Request] = WaitingHeap(ordering, max_wait_s, old.priority_tokens)
        heap.overtakes, heap.promotions, heap.epoch = old.overtakes, old.promotions, old.epoch + 1
        return heap

    def _take_back(self, ordering: QueueOrdering, max_wait_s: float | None) -> None:
        """Puts what waits into a new heap, each request as old as it is.

        Requests learn their places once all is done: when it fails, no request may keep an entry
        of a heap that nobody has.
        """
        heap, state = self._empty_heap(ordering, max_wait_s), self.state()
        entries = []
        for request in sorted(self._all.values(), key=lambda r: getattr(r, _WAITS)[::-1]):
            queued_s = min(getattr(request, _WAITS)[1], state.now_s)
            entries.append(self._enter(heap, request, replace(state, now_s=queued_s)))
        preempted = (r for r in self._all.values() if r.status == RequestStatus.PREEMPTED)
        for request in sorted(preempted, key=_vllm_order):
            heap.restore(heap.remove(request.request_id), front=True)
        if self.gate is not None:
            self.gate = BlockedHeadGate(self.gate.max_steps, self.gate.max_wait_s)
        for entry in entries:
            setattr(entry.item, PLACE, entry)
        self.heap, self.fallback, self._valid_epoch = heap, None, heap.epoch

    # Falling back. Nothing from here on may fail: it is what happens when something else has.

    def _guarded(self, name: str, action: Callable[..., Any], *arguments: Any) -> Any:
        """`action`, or vLLM's method `name` once it has failed."""
        if self.fallback is None:
            try:
                return action(*arguments)
            except Exception as error:
                self._fall_back(error)
                if name in ("add_request", "prepend_request"):
                    return None  # the queue that took over holds it already
        return getattr(self.fallback, name)(*arguments)

    def _fall_back(self, error: Exception) -> None:
        """Counts a failure of the ordering; vLLM's queue orders the rest of the step."""
        if self.fallback is None:
            self._hand_over()
        self.guard.fell_back("ordering", error)

    def _hand_over(self) -> None:
        """Puts what waits into a queue of vLLM's, in the order that it would have there."""
        queue = create_request_queue(self.policy)
        for request in sorted(self._all.values(), key=_vllm_order):
            setattr(request, PLACE, None)
            queue.add_request(request)
        self.fallback = queue
        self._offered = None
