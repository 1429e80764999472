"""Cost of the waiting queue with 10,000 requests in it.

    pytest benchmarks/bench_queue.py --benchmark-columns=median,iqr

Targets: push plus pop at most 10 us; removal by id amortized O(log n).
"""

from __future__ import annotations

import random
from itertools import count

import pytest

from gimbal.core.contracts import QueuedRequest, QueueState
from gimbal.core.queue import ORDERINGS
from gimbal.core.queue.budget import PrefillCandidate, share_prefill_budget
from gimbal.core.queue.heap import WaitingHeap

WAITING = 10_000


def filled(ordering: str, waiting: int = WAITING) -> tuple[WaitingHeap[None], random.Random]:
    rng = random.Random(0)
    heap: WaitingHeap[None] = WaitingHeap(ORDERINGS.build(ordering), max_wait_s=1e9)
    for i in range(waiting):
        state = QueueState(i * 1e-3, 1000.0, i, heap.waiting_tokens)
        heap.add(QueuedRequest(f"r{i}", i * 1e-3, rng.randint(10, 4000)), None, state)
    return heap, rng


@pytest.mark.parametrize("ordering", ["gimbal", "fcfs", "sjf"])
def test_push_and_pop(benchmark, ordering):
    heap, rng = filled(ordering)
    ids = count(WAITING)
    requests = [QueuedRequest(f"r{next(ids)}", 10.0, rng.randint(10, 4000)) for _ in range(200_000)]
    waiting = iter(requests)
    state = QueueState(10.0, 1000.0, WAITING, 0)

    def push_and_pop() -> None:
        heap.add(next(waiting), None, state)
        heap.pop(10.0)

    benchmark.pedantic(push_and_pop, rounds=20, iterations=5000, warmup_rounds=1)


def test_remove_by_id_and_push(benchmark):
    heap, rng = filled("gimbal")
    ids = [e.request.request_id for e in heap]
    rng.shuffle(ids)
    state = QueueState(10.0, 1000.0, WAITING, 0)
    cursor = count()

    def remove_and_push() -> None:
        index = next(cursor) % WAITING
        request = heap.remove(ids[index]).request
        heap.add(request, None, state)

    benchmark.pedantic(remove_and_push, rounds=20, iterations=5000, warmup_rounds=1)


def test_hrrn_pass_with_128_waiting(benchmark):
    heap, _ = filled("hrrn", 128)
    benchmark(heap.refresh, QueueState(10.0, 1000.0, 128, 0, 5000.0))


def test_next_eight_of_10000(benchmark):
    heap, _ = filled("gimbal")
    assert len(benchmark(heap.first, 8)) == 8


def test_share_budget(benchmark):
    running = [PrefillCandidate(float(i), 1000) for i in range(4)]
    waiting = [PrefillCandidate(float(i) + 0.5, 100) for i in range(8)]
    benchmark(share_prefill_budget, running, waiting, 512)
