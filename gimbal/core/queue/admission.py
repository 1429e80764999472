"""Who is admitted into the KV cache: running requests keep room to grow, blocked heads are passed.

vLLM admits whatever fits now. The next decodes then find no block, and the latest request is
thrown out to be computed again. `room_blocks` is what admission leaves free: the rest of every
prompt that is being prefilled, and room for some tokens more of each running request. An empty
engine leaves nothing free, so that whatever fits at all is admitted at the latest when the others
have ended.

A head that does not fit may be passed by smaller requests, but not for ever. vLLM stops admitting
at the first request that gets no KV blocks (vLLM #31731, #33499), so one large prompt idles an
engine that could serve the small ones behind it. Here a blocked head may be passed for `max_steps`
scheduling steps and `max_wait_s` seconds since it was first blocked; from then on it is offered
alone, which keeps every block that is freed for it until it fits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from gimbal.core.queue.heap import Entry, WaitingHeap

T = TypeVar("T")
T_contra = TypeVar("T_contra", contravariant=True)

PASS_CANDIDATES = 16
"""Requests looked at behind a head that gets no KV blocks."""


class RunningView(Protocol):
    """What `room_blocks` asks about an engine.

    Attributes:
        running_requests: prefills and decodes.
        running_prefill_tokens: what running prompts lack.
        block_tokens: tokens of a KV block.
    """

    @property
    def running_requests(self) -> int: ...
    @property
    def running_prefill_tokens(self) -> int: ...
    @property
    def block_tokens(self) -> int: ...


def room_blocks(view: RunningView, room_tokens: int) -> int:
    """KV blocks that must stay free when a waiting request is admitted.

    Whoever admits adds room for one more request with every request that it admits in the step.

    Args:
        room_tokens: growth of each running request that is provided for; 0: none, as in vLLM.
    """
    running = view.running_requests if room_tokens else 0
    if not running:
        return 0
    return -(-(view.running_prefill_tokens + running * room_tokens) // view.block_tokens)


@dataclass(frozen=True, slots=True)
class KvNeed:
    """A waiting request and the KV blocks it needs to be admitted."""

    request_id: str
    blocks: int


class BlockedHeadGate:
    """Chooses which waiting request to offer. One per queue.

    Args:
        max_steps: scheduling steps in which a blocked head may be passed.
        max_wait_s: seconds after which it may not be passed any more.
    """

    def __init__(self, max_steps: int = 32, max_wait_s: float = 1.0) -> None:
        self.max_steps = max_steps
        self.max_wait_s = max_wait_s
        self.passes = 0
        self.reservations = 0
        self._blocked: dict[str, tuple[int, float]] = {}  # id -> step, time first blocked
        self._reserved: str | None = None

    def choose(
        self, candidates: Sequence[KvNeed], free_blocks: int, step: int, now_s: float
    ) -> int:
        """Index of the candidate to offer: 0 unless the head is blocked and may be passed.

        Args:
            candidates: the next waiting requests in order, the head first; not empty.
            free_blocks: KV blocks that can be allocated now.
            step: number of the scheduling step.
            now_s: seconds, same clock in every call.
        """
        head = candidates[0]
        if head.blocks <= free_blocks:
            return 0
        first_step, first_s = self._blocked.setdefault(head.request_id, (step, now_s))
        if step - first_step >= self.max_steps or now_s - first_s >= self.max_wait_s:
            if self._reserved != head.request_id:
                self._reserved = head.request_id
                self.reservations += 1
            return 0
        for index in range(1, len(candidates)):
            if candidates[index].blocks <= free_blocks:
                self.passes += 1
                return index
        return 0

    def forget(self, request_id: str) -> None:
        """The request left the queue: admitted or aborted."""
        self._blocked.pop(request_id, None)
        if self._reserved == request_id:
            self._reserved = None


class KvRoom(Protocol[T_contra]):
    """What an engine knows of its KV blocks."""

    def free_blocks(self) -> int:
        """KV blocks that can be allocated now."""
        ...

    def blocks_needed(self, item: T_contra, free: int) -> int:
        """KV blocks `item` needs to be admitted; exact only where it decides about `free`."""
        ...


def next_entry(
    heap: WaitingHeap[T], gate: BlockedHeadGate | None, room: KvRoom[T], step: int, now_s: float
) -> Entry[T]:
    """The entry to offer for admission: the heap's head, or one that may pass it.

    Args:
        gate: None where nobody passes a head.
        step, now_s: see `BlockedHeadGate.choose`.

    Raises IndexError when nothing waits.
    """
    head = heap.peek(now_s)
    if gate is None:
        return head
    free = room.free_blocks()
    head_needs = room.blocks_needed(head.item, free)
    if head_needs <= free:
        return head
    behind = [e for e in heap.first(PASS_CANDIDATES) if e is not head]
    needs = [KvNeed(e.request.request_id, room.blocks_needed(e.item, free)) for e in behind]
    needs.insert(0, KvNeed(head.request.request_id, head_needs))
    return [head, *behind][gate.choose(needs, free, step, now_s)]
