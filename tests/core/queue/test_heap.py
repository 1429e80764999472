"""The heap against a plain list: nothing is lost, nothing comes twice, places are kept."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gimbal.core.contracts import QueuedRequest, QueueState
from gimbal.core.queue import ORDERINGS
from gimbal.core.queue.fcfs import FcfsOrdering
from gimbal.core.queue.heap import FRONT, Entry, WaitingHeap
from gimbal.core.queue.sjf import SjfOrdering

OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(
            [
                "add",
                "add",
                "pop",
                "skip",
                "preempt",
                "remove",
                "return",
                "resize",
                "switch",
                "refresh",
            ],
        ),
        st.integers(0, 10_000),  # size, or which request
        st.integers(0, 2),  # priority
        st.floats(0.0, 5.0),  # seconds since the last operation
        st.floats(1.0, 1e5),  # prefill throughput, tokens/s
    ),
    max_size=80,
)


def reference_head(heap: WaitingHeap[str], entries: list[Entry[str]], now_s: float) -> Entry[str]:
    def rank(entry):
        return (
            0 if heap.priority_tokens else entry.request.priority,
            entry.lane,
            entry.key,
            entry.request.arrival_s,
            entry.sequence,
        )

    head = min(entries, key=rank)
    if heap.max_wait_s is None or head.lane == FRONT:
        return head
    mates = [e for e in entries if rank(e)[0] == rank(head)[0]]
    oldest = min(mates, key=lambda e: (e.queued_s, e.sequence))
    return oldest if now_s - oldest.queued_s > heap.max_wait_s else head


@settings(max_examples=300)
@given(
    OPERATIONS,
    st.sampled_from(sorted(ORDERINGS)),
    st.sampled_from([None, 3.0]),
    st.sampled_from([0.0, 100.0]),
)
def test_no_request_is_lost_or_duplicated(operations, ordering, max_wait_s, priority_tokens):
    heap: WaitingHeap[str] = WaitingHeap(ORDERINGS.build(ordering), max_wait_s, priority_tokens)
    waiting: dict[str, Entry[str]] = {}
    served: list[Entry[str]] = []
    now_s, served_tokens, count = 0.0, 0.0, 0
    for action, number, priority, elapsed_s, rate in operations:
        now_s += elapsed_s
        state = QueueState(now_s, rate, len(heap), heap.waiting_tokens, served_tokens)
        names = sorted(waiting)
        if action == "add":
            count += 1
            request = QueuedRequest(f"r{count}", now_s, number, priority, served_tokens)
            waiting[request.request_id] = heap.add(request, request.request_id, state)
        elif action == "pop" and waiting:
            expected = reference_head(heap, list(waiting.values()), now_s)
            assert heap.peek(now_s) is expected
            popped = heap.pop(now_s)
            assert popped is expected
            served.append(waiting.pop(popped.request.request_id))
            served_tokens += popped.request.uncached_tokens
        elif action == "skip" and waiting:
            before = [e.item for e in heap]
            taken = [heap.pop(now_s) for _ in range(min(len(heap), 1 + number % 3))]
            for entry in reversed(taken):
                heap.restore(entry)
            assert [e.item for e in heap] == before
        elif action in ("preempt", "return") and served:
            entry = served.pop(number % len(served))
            heap.restore(entry, front=action == "preempt")
            waiting[entry.request.request_id] = entry
        elif action == "remove" and waiting:
            name = names[number % len(names)]
            assert heap.remove(name) is waiting.pop(name)
        elif action == "resize" and waiting:
            entry = waiting[names[priority % len(names)]]
            age = entry.lane, entry.queued_s, entry.sequence
            heap.resize(entry, number, state)
            assert (entry.lane, entry.queued_s, entry.sequence) == age
        elif action == "switch":
            name = sorted(ORDERINGS)[number % 4]
            heap.reorder(ORDERINGS.build(name), state, max_wait_s)
        elif action == "refresh":
            heap.refresh(state)
        assert len(heap) == len(waiting)
        assert heap.waiting_tokens == sum(e.request.uncached_tokens for e in waiting.values())
        in_order = list(heap)
        assert {e.item for e in in_order} == set(waiting)
        assert len(in_order) == len(waiting)
        assert heap.first(4) == in_order[:4]
        oldest = heap.oldest()
        assert (oldest is None) == (not waiting)
        if oldest is not None:
            assert oldest.queued_s == min(e.queued_s for e in waiting.values())
    drained = [heap.pop(now_s).item for _ in range(len(heap))]
    assert sorted(drained) == sorted(waiting)
    with pytest.raises(IndexError):
        heap.peek(now_s)


def filled(count: int, ordering=None, **options) -> WaitingHeap[int]:
    heap: WaitingHeap[int] = WaitingHeap(ordering or FcfsOrdering(), **options)
    for i in range(count):
        now_s = float(i)
        state = QueueState(now_s, 100.0, i, 0)
        heap.add(QueuedRequest(str(i), now_s, 1000 - i, i % 2), i, state)
    return heap


def test_an_id_waits_once_only():
    heap = filled(3)
    with pytest.raises(KeyError, match="already waiting"):
        heap.add(QueuedRequest("1", 0.0, 1), 1, QueueState(0.0, 1.0, 0, 0))
    entry = heap.remove("1")
    heap.restore(entry)
    with pytest.raises(KeyError, match="already waiting"):
        heap.restore(entry)
    with pytest.raises(KeyError):
        heap.remove("nobody")


def test_priority_classes_come_first_unless_they_are_worth_tokens():
    assert [e.item for e in filled(6)] == [0, 2, 4, 1, 3, 5]
    strict = filled(4, SjfOrdering())
    assert [e.item for e in strict] == [2, 0, 3, 1]
    mixed = filled(4, SjfOrdering(), priority_tokens=1.5)
    assert [e.item for e in mixed] == [2, 3, 0, 1]


def test_promotion_is_oldest_first_within_the_class_and_counted():
    heap = filled(6, SjfOrdering(), max_wait_s=4.5)
    # At 7 s requests 0, 1 and 2 have waited too long; class 0 first.
    served = [heap.pop(7.0).item for _ in range(6)]
    assert served == [0, 2, 4, 1, 5, 3]
    assert heap.promotions == 3
    # 5 passed 3; the rest went by age within their class.
    assert heap.overtakes == 1


def test_memory_stays_proportional_to_what_waits():
    heap = filled(10)
    for i in range(10, 5000):
        heap.add(QueuedRequest(str(i), 0.0, i), i, QueueState(float(i), 1.0, 0, 0))
        heap.remove(str(i - 5))
    assert len(heap) == 10
    assert len(heap._heap) < 100
    assert sum(map(len, heap._by_age.values())) < 150


def test_what_is_put_back_has_overtaken_nobody():
    heap = filled(4, SjfOrdering(), max_wait_s=100.0)
    entry = heap.pop(4.0)
    assert (entry.item, heap.overtakes) == (2, 1)
    heap.restore(entry)
    assert heap.overtakes == 0
    promoted = heap.pop(150.0)
    assert (promoted.item, heap.promotions) == (0, 1)
    heap.restore(promoted)
    assert heap.promotions == 0


def test_work_that_turns_out_otherwise_moves_the_key_and_not_the_age():
    heap = filled(4, ORDERINGS.build("gimbal"))
    first = heap.peek(4.0)
    key = first.key
    heap.resize(first, first.request.uncached_tokens + 5000, QueueState(9.0, 100.0, 4, 0))
    assert first.key == key + 5000
    assert [e.item for e in heap][-1] != first.item, "of the other class are those behind it"
    assert heap.oldest().queued_s == 0.0
    taken = heap.pop(9.0)
    heap.resize(taken, 7, QueueState(9.0, 100.0, 3, 0))
    assert heap.waiting_tokens == sum(e.request.uncached_tokens for e in heap)
    shortest = filled(3, SjfOrdering())
    heap_entry = next(e for e in shortest if e.item == 0)
    shortest.resize(heap_entry, 1, QueueState(9.0, 100.0, 3, 0))
    assert shortest.pop(9.0).item == 0


def test_a_dynamic_ordering_gives_new_keys_itself():
    heap = filled(4, ORDERINGS.build("hrrn"))
    last = list(heap)[-1]
    before = [e.item for e in heap]
    heap.resize(last, 1, QueueState(9.0, 100.0, 4, 0))
    assert [e.item for e in heap] == before


def test_a_place_from_before_a_change_of_ordering_is_the_first():
    heap = filled(4, SjfOrdering())
    running = heap.pop(4.0)
    heap.reorder(FcfsOrdering(), QueueState(5.0, 1.0, 3, 0))
    heap.restore(running)
    assert heap.pop(5.0) is running


def test_classes_that_come_once_leave_nothing_behind():
    """Priorities may be deadlines: as many classes as requests."""
    heap: WaitingHeap[str] = WaitingHeap(FcfsOrdering())
    for number in range(500):
        state = QueueState(float(number), 0.0, len(heap), heap.waiting_tokens)
        heap.add(QueuedRequest(f"r{number}", float(number), 10, priority=number), "", state)
        if number % 2:
            heap.remove(f"r{number}")
        else:
            heap.pop(float(number))
        assert heap.oldest() is None
    assert len(heap._by_age) == 0


def test_the_oldest_is_found_whoever_went_and_came_back():
    heap: WaitingHeap[str] = WaitingHeap(SjfOrdering())
    state = QueueState(0.0, 0.0, 0, 0)
    entries = [heap.add(QueuedRequest(f"r{i}", 0.0, 100 - i), "", state) for i in range(6)]
    for index in (0, 3, 1):
        heap.remove(f"r{index}")
    assert heap.oldest() is entries[2]  # r0 and r1 are forgotten by now
    for index, oldest in ((3, 2), (1, 1), (0, 0)):
        heap.restore(entries[index])
        assert heap.oldest() is entries[oldest]
    for index in range(6):
        assert heap.oldest() is entries[index]
        heap.remove(f"r{index}")
