"""The bound of the `gimbal` ordering, on random arrivals and on a flood of short prompts."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gimbal.core.contracts import QueuedRequest, QueueState
from gimbal.core.queue.gimbal import GimbalOrdering, GimbalOrderingOptions
from gimbal.core.queue.heap import Entry, WaitingHeap


class Server:
    """One engine that prefills `budget` tokens per step in the order of the keys."""

    def __init__(self, ordering: GimbalOrdering, max_wait_s: float | None = None) -> None:
        self.heap: WaitingHeap[int] = WaitingHeap(ordering, max_wait_s)
        self.running: list[list] = []  # [entry, tokens left]
        self.overtaken: dict[str, float] = {}  # later work done ahead of a request
        self.finished_s: dict[str, float] = {}
        self.watched: dict[str, Entry[int]] = {}  # unfinished ones to account for

    def arrive(self, name: str, tokens: int, now_s: float, rate: float, watch: bool = True) -> None:
        state = QueueState(now_s, rate, len(self.heap), self.heap.waiting_tokens)
        entry = self.heap.add(QueuedRequest(name, now_s, tokens), 0, state)
        if watch:
            self.watched[name] = entry
            self.overtaken[name] = 0.0

    def step(self, budget: int, now_s: float) -> int:
        """Serves up to `budget` tokens; returns what was left over."""
        served: list[tuple[Entry[int], int]] = []
        done = []
        pending = sorted(self.running, key=self._running_key)
        while budget > 0 and (pending or len(self.heap)):
            head = self.heap.peek(now_s) if len(self.heap) else None
            if pending and (head is None or self._running_key(pending[0]) <= head.key):
                slot = pending.pop(0)
            else:
                entry = self.heap.pop(now_s)
                slot = [entry, entry.request.uncached_tokens]
                self.running.append(slot)
            grant = min(budget, slot[1])
            budget -= grant
            slot[1] -= grant
            served.append((slot[0], grant))
            if slot[1] == 0:
                done.append(slot)
        for name, entry in self.watched.items():
            for other, tokens in served:
                if other is entry:
                    break
                self.overtaken[name] += tokens if other.sequence > entry.sequence else 0
        for slot in done:
            self.running.remove(slot)
            name = slot[0].request.request_id
            self.finished_s[name] = now_s
            self.watched.pop(name, None)
        return budget

    def _running_key(self, slot: list) -> float:
        return slot[0].key - (slot[0].request.uncached_tokens - slot[1])


@settings(max_examples=150)
@given(
    st.lists(
        st.tuples(
            st.integers(1, 3000),  # uncached tokens
            st.floats(0.0, 2.0),  # seconds after the previous arrival
            st.sampled_from([0.0, 1.0, 50.0, 1000.0, 1e6]),  # measured rate at that moment
        ),
        min_size=2,
        max_size=40,
    ),
    st.sampled_from([1.0, 2.0, 10.0, 40.0]),
    st.sampled_from([0.0, 1.0, 8.0]),
    st.sampled_from([37, 512]),
)
def test_overtaking_work_is_bounded(arrivals, factor, backlog_factor, budget):
    server = Server(GimbalOrdering(GimbalOrderingOptions(factor, backlog_factor, 0.0)))
    now_s, due = 0.0, []
    for index, (tokens, gap_s, rate) in enumerate(arrivals):
        now_s += gap_s
        due.append((now_s, f"r{index}", tokens, rate))
    clock_s = 0.0
    while due or server.watched:
        while due and due[0][0] <= clock_s:
            at, name, tokens, rate = due.pop(0)
            server.arrive(name, tokens, at, rate)
        server.step(budget, clock_s)
        clock_s += 0.1
    for index, (tokens, _, _) in enumerate(arrivals):
        assert server.overtaken[f"r{index}"] < factor * tokens


@pytest.mark.parametrize("rate", [1.0, 1000.0, 1e5], ids=["slow", "true", "fast"])
def test_short_requests_at_twice_capacity_for_an_hour_never_starve_a_long_one(rate):
    """Long prompts every ten minutes among short ones, 2,000 tokens/s offered to 1,000 served."""
    factor, throughput = 10.0, 1000.0
    server = Server(GimbalOrdering(GimbalOrderingOptions(factor, 4.0)))
    rng = random.Random(5)
    backlog_at: dict[str, float] = {}
    due_s: dict[str, float] = {}
    backlog, step_s, shorts = 0.0, 0.5, 0
    for step in range(7200):
        now_s = step * step_s
        if step % 1200 == 0:
            name = f"long{step}"
            backlog_at[name], due_s[name] = backlog, now_s
            server.arrive(name, 3000, now_s, rate)
            backlog += 3000
        offered = 0
        while offered < 2 * throughput * step_s:
            tokens = rng.randint(50, 150)
            shorts += 1
            server.arrive(f"s{shorts}", tokens, now_s, rate, watch=False)
            offered += tokens
        backlog += offered
        backlog -= throughput * step_s - server.step(int(throughput * step_s), now_s)
    bounds = {n: (backlog_at[n] + (factor + 1) * 3000) / throughput + step_s for n in backlog_at}
    due = [n for n in bounds if due_s[n] + bounds[n] < 3600.0]
    assert len(due) >= 3
    for name in due:
        assert server.finished_s[name] - due_s[name] <= bounds[name]
        assert server.overtaken[name] < factor * 3000
