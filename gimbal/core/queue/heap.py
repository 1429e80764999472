"""The waiting queue itself: a heap of requests under one `QueueOrdering`.

Used by vLLM's ``RequestQueue`` adapter and by the simulator. Order: priority class first, then
requests put back at the front (preempted ones), then key, arrival and insertion; a request past
the absolute limit on waiting goes before the others of its class that are not at the front.
Removal is lazy: a tuple in a heap counts only while its entry still points at it.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Generic, TypeVar, cast

from gimbal.core.contracts import (
    DynamicOrdering,
    QueuedRequest,
    QueueOrdering,
    QueueState,
    traits_of,
)
from gimbal.core.errors import PolicyError, with_type

T = TypeVar("T")

FRONT, ORDERED = 0, 1
"""Lanes: put back at the front (preempted), and everyone else."""

_SLACK = 64
"""Dead places a heap or a list by age may hold beyond its live ones before it is rebuilt."""

_BY_SEQUENCE = attrgetter("sequence")


@dataclass(slots=True, eq=False)
class Entry(Generic[T]):
    """One request's place in the queue. It outlives a pop, so that the place can be restored."""

    request: QueuedRequest
    item: T
    key: float
    queued_s: float
    sequence: int
    bound_s: float = float("inf")  # what the ordering allows it to wait, for the record
    lane: int = ORDERED
    promoted: bool = False  # offered ahead of its key because it waited past the limit
    overtook: bool = False  # taken while an earlier one waited
    epoch: int = 0  # `WaitingHeap.epoch` under which the key was computed
    in_ages: bool = False
    rank: tuple | None = field(default=None, repr=False)  # its live tuple; None when not waiting


def _dynamic(ordering: QueueOrdering) -> DynamicOrdering | None:
    return cast(DynamicOrdering, ordering) if traits_of(ordering).dynamic else None


def _named(ordering: QueueOrdering) -> str:
    kind = type(ordering)
    return f"queue ordering {kind.__module__}:{kind.__qualname__}"


def _failed(ordering: QueueOrdering, error: Exception) -> PolicyError:
    return PolicyError(f"{_named(ordering)}: {with_type(error)}")


class WaitingHeap(Generic[T]):
    """Requests in the order of `ordering`.

    Args:
        ordering: computes keys.
        max_wait_s: requests that have waited longer are served oldest first, ahead of the rest of
            their class; None never promotes.
        priority_tokens: with 0, a lower ``QueuedRequest.priority`` always goes first and aging
            works inside a class. With x > 0 there is one class, and one level of priority is
            worth x tokens of key: aging works across classes.

    add, pop: O(log n). remove: O(1) plus its share of rebuilding, amortized O(log n). restore: the
    same, and O(n) moves of a pointer for one that went and comes back to the middle.
    """

    def __init__(
        self,
        ordering: QueueOrdering,
        max_wait_s: float | None = None,
        priority_tokens: float = 0.0,
    ) -> None:
        self.ordering = ordering
        self.max_wait_s = max_wait_s
        self.priority_tokens = priority_tokens
        self.waiting_tokens = 0
        self.promotions = 0
        self.overtakes = 0
        self.epoch = 0
        self._none_late_until_s = float("-inf")  # before it nobody has waited past the limit
        self._dynamic = _dynamic(ordering)
        self._heap: list[tuple] = []
        self._by_age: dict[int, deque[Entry[T]]] = {}  # per priority class, oldest first
        self._entries: dict[str, Entry[T]] = {}
        self._sequence = 0
        self._pushes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._entries

    def __iter__(self) -> Iterator[Entry[T]]:
        """Entries by key, promotions aside; the queue may change while iterating."""
        for rank in sorted(e.rank for e in self._entries.values() if e.rank is not None):
            yield rank[-1]

    def add(self, request: QueuedRequest, item: T, state: QueueState) -> Entry[T]:
        """Queues a request.

        Raises KeyError when its id is waiting already, PolicyError when it gets no key; the queue
        is then as it was.
        """
        if request.request_id in self._entries:
            raise KeyError(f"request {request.request_id!r} is already waiting")
        key = self._key(self.ordering, request, state)
        self._sequence += 1
        entry = Entry(request, item, key, state.now_s, self._sequence, epoch=self.epoch)
        self._insert(entry)
        return entry

    def restore(self, entry: Entry[T], *, front: bool = False) -> None:
        """Puts a popped or removed entry back at its old place, or at the front of its class.

        What it overtook when it was popped no longer counts. After a change of the ordering its
        key means nothing: it was ahead of everyone when it was popped, and is so again.
        """
        if entry.request.request_id in self._entries:
            raise KeyError(f"request {entry.request.request_id!r} is already waiting")
        if front:
            entry.lane = FRONT
        else:
            self.overtakes -= entry.overtook
            self.promotions -= entry.promoted
        entry.overtook = entry.promoted = False
        if entry.epoch != self.epoch:
            entry.key, entry.epoch = float("-inf"), self.epoch
        self._insert(entry)

    def peek(self, now_s: float) -> Entry[T]:
        """The next entry; raises IndexError when empty."""
        heap = self._heap
        # Twice per admission: the common case spares a call.
        head = heap[0][-1] if heap and heap[0][-1].rank is heap[0] else self.head()
        if self.max_wait_s is None or now_s <= self._none_late_until_s or head.lane == FRONT:
            return head
        oldest = self._oldest_of(self._level(head.request))
        if oldest is not None and now_s - oldest.queued_s > self.max_wait_s:
            oldest.promoted = oldest is not head
            return oldest
        first = self.oldest()
        if first is not None:
            self._none_late_until_s = first.queued_s + self.max_wait_s
        return head

    def head(self) -> Entry[T]:
        """The first entry by key, promotions aside; raises IndexError when empty."""
        heap = self._heap
        while heap:
            rank = heap[0]
            entry: Entry[T] = rank[-1]
            if entry.rank is rank:
                return entry
            heapq.heappop(heap)
        raise IndexError("the waiting queue is empty")

    def pop(self, now_s: float) -> Entry[T]:
        """Takes the next entry; raises IndexError when empty."""
        return self.take(self.peek(now_s))

    def take(self, entry: Entry[T]) -> Entry[T]:
        """Takes a waiting entry for service: a pop that may come from behind the head."""
        level = self._level(entry.request)
        oldest = self._oldest_of(level)
        if oldest is not None and oldest.sequence < entry.sequence:
            entry.overtook = True
            self.overtakes += 1
        self.promotions += entry.promoted
        return self._detach(entry, level)

    def remove(self, request_id: str) -> Entry[T]:
        """Takes a request out by id (an abort); raises KeyError when it is not waiting."""
        entry = self._entries[request_id]
        entry.promoted = False
        return self._detach(entry, self._level(entry.request))

    def resize(self, entry: Entry[T], uncached_tokens: int, state: QueueState) -> None:
        """A request turned out to take other prefill work than it was queued with.

        It keeps its age and its lane, waiting or taken. A key that counts tokens moves by the
        difference, a dynamic ordering's is left to `refresh`, others are computed anew. Raises
        PolicyError, as `add`.
        """
        more = uncached_tokens - entry.request.uncached_tokens
        request = replace(entry.request, uncached_tokens=uncached_tokens)
        if traits_of(self.ordering).shares_steps:
            key = entry.key + more
        elif self._dynamic is not None:
            key = entry.key
        else:
            then = replace(state, now_s=min(entry.queued_s, state.now_s))
            key = self._key(self.ordering, request, then)
        entry.request, entry.key = request, key
        if entry.rank is not None:
            self.waiting_tokens += more
            entry.rank = self._rank(entry)
            heapq.heappush(self._heap, entry.rank)

    def oldest(self) -> Entry[T] | None:
        """The entry that has waited longest, over all classes."""
        found = (self._oldest_of(level) for level in list(self._by_age))
        return min((e for e in found if e is not None), key=lambda e: e.queued_s, default=None)

    def first(self, count: int) -> list[Entry[T]]:
        """The next `count` entries in order, O(count log count) plus dead tuples met."""
        heap = self._heap
        found: list[Entry[T]] = []
        frontier = [(heap[0], 0)] if heap else []
        while frontier and len(found) < count:
            rank, index = heapq.heappop(frontier)
            if rank[-1].rank is rank:
                found.append(rank[-1])
            for child in (2 * index + 1, 2 * index + 2):
                if child < len(heap):
                    heapq.heappush(frontier, (heap[child], child))
        return found

    @property
    def is_dynamic(self) -> bool:
        """Whether `refresh` has anything to do."""
        return self._dynamic is not None

    def refresh(self, state: QueueState) -> None:
        """Recomputes a dynamic ordering's keys; call before a scheduling pass.

        Raises PolicyError when it gives none; the queue is then as it was.
        """
        if self._dynamic is None or not self._entries:
            return
        entries = list(self._entries.values())
        keys = self._dynamic_keys(entries, state)
        if keys is not None:
            self._rekey(entries, keys)

    def reorder(
        self, ordering: QueueOrdering, state: QueueState, max_wait_s: float | None = None
    ) -> None:
        """Changes the ordering; every waiting request keeps its age and its lane.

        Keys are computed in the order of queueing, each with the state at its own arrival time,
        so that an ordering with a clock sees the arrivals as if it had been there. Raises
        PolicyError when it gives no keys; the queue then keeps the ordering it had.
        """
        entries = sorted(self._entries.values(), key=lambda e: (e.queued_s, e.sequence))
        keys = []
        for entry in entries:
            then = replace(state, now_s=min(entry.queued_s, state.now_s))
            keys.append(self._key(ordering, entry.request, then))
        self.ordering = ordering
        self.max_wait_s = max_wait_s
        self._none_late_until_s = float("-inf")
        self.epoch += 1
        self._dynamic = _dynamic(ordering)
        self._rekey(entries, keys)

    def _key(self, ordering: QueueOrdering, request: QueuedRequest, state: QueueState) -> float:
        """The place that `ordering` gives a request; PolicyError naming it when it is no number."""
        try:
            key = ordering.key(request, state) + request.priority * self.priority_tokens
            if key <= key:  # false for NaN; what cannot be compared raises here, not in the heap
                return key
        except Exception as error:
            raise _failed(ordering, error) from error
        raise PolicyError(f"{_named(ordering)}: key of a request is {key}, expected a number")

    def _dynamic_keys(self, entries: list[Entry[T]], state: QueueState) -> list[float] | None:
        """The places that a dynamic ordering gives all; PolicyError as `_key`."""
        assert self._dynamic is not None
        try:
            keys = self._dynamic.keys([e.request for e in entries], state)
            if keys is None:
                return None
            named = _named(self.ordering)
            if len(keys) != len(entries):
                raise PolicyError(f"{named}: {len(keys)} keys for {len(entries)} requests")
            worth = self.priority_tokens
            if worth > 0.0:
                keys = [k + e.request.priority * worth for e, k in zip(entries, keys, strict=True)]
            total = sum(keys)  # NaN when one is, or when both infinities are there
            if not total <= total and any(key != key for key in keys):
                raise PolicyError(f"{named}: a key is NaN, expected numbers")
        except PolicyError:
            raise
        except Exception as error:
            raise _failed(self.ordering, error) from error
        return keys

    def _rekey(self, entries: list[Entry[T]], keys: list[float]) -> None:
        for entry, key in zip(entries, keys, strict=True):
            entry.key, entry.epoch = key, self.epoch
            entry.rank = self._rank(entry)
        self._heap = [entry.rank for entry in entries if entry.rank is not None]
        heapq.heapify(self._heap)

    def _level(self, request: QueuedRequest) -> int:
        return 0 if self.priority_tokens > 0.0 else request.priority

    def _rank(self, entry: Entry[T]) -> tuple:
        self._pushes += 1  # unique, so that a comparison never reaches the entry
        return (
            self._level(entry.request),
            entry.lane,
            entry.key,
            entry.request.arrival_s,
            entry.sequence,
            self._pushes,
            entry,
        )

    def _oldest_of(self, level: int) -> Entry[T] | None:
        ages = self._by_age.get(level)
        while ages:
            entry = ages[0]
            if entry.rank is not None:
                return entry
            ages.popleft().in_ages = False
        self._by_age.pop(level, None)  # priorities may be as many as requests
        return None

    def _insert(self, entry: Entry[T]) -> None:
        self._entries[entry.request.request_id] = entry
        self.waiting_tokens += entry.request.uncached_tokens
        entry.rank = self._rank(entry)
        heapq.heappush(self._heap, entry.rank)
        if self.max_wait_s is not None:
            late_s = entry.queued_s + self.max_wait_s
            self._none_late_until_s = min(self._none_late_until_s, late_s)
        if not entry.in_ages:
            entry.in_ages = True
            ages = self._by_age.setdefault(self._level(entry.request), deque())
            if not ages or ages[-1].sequence < entry.sequence:
                ages.append(entry)
            else:  # one that comes back
                insort(ages, entry, key=_BY_SEQUENCE)

    def _detach(self, entry: Entry[T], level: int) -> Entry[T]:
        rank = entry.rank
        del self._entries[entry.request.request_id]
        self.waiting_tokens -= entry.request.uncached_tokens
        entry.rank = None
        heap = self._heap
        if heap and heap[0] is rank:
            heapq.heappop(heap)
        dead_limit = 2 * len(self._entries) + _SLACK
        if len(heap) > dead_limit:
            self._heap = [r for r in heap if r[-1].rank is r]
            heapq.heapify(self._heap)
        ages = self._by_age[level]
        if len(ages) > dead_limit:
            for other in ages:
                other.in_ages = other.rank is not None
            self._by_age[level] = deque(other for other in ages if other.in_ages)
        return entry
