"""The policies: queue, step decisions, dispatcher, online cost, planner."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from gimbal.core.config import DispatchConfig, PlacementConfig, QueueConfig
from gimbal.core.contracts import (
    DispatchRequest,
    QueuedRequest,
    QueueState,
    RoutingCounts,
    Topology,
)
from gimbal.core.cost.online import WARM_STEPS, OnlineStepCost
from gimbal.core.dispatch import POLICIES
from gimbal.core.dispatch.dispatcher import Dispatcher
from gimbal.core.placement import PLACERS, verify
from gimbal.core.placement.backends import GATHER_BACKEND, ROUTED_BACKEND
from gimbal.core.placement.planner import ModelFacts, Planner, cost_constants
from gimbal.core.placement.problem import CostConstants
from gimbal.core.queue import ORDERINGS
from gimbal.core.queue.budget import PrefillCandidate, StepCost
from gimbal.core.queue.heap import FRONT, Entry, WaitingHeap
from gimbal.core.queue.step import LEAST_TOKENS, RecordedView, decide
from gimbal.core.snapshot import ACCEPTED_REQUESTS, ACCEPTED_TOKENS, LARGEST, ROW_WIDTH, Field
from gimbal.testing import placement
from tests.fuzz.values import check, count


def queue(rng: random.Random) -> None:
    """Random operations on a heap against a plain list: nothing lost, nothing twice, in order."""
    model = _QueueModel(rng)
    for _ in range(rng.randrange(1, 24)):
        model.operate()
        model.compare()
    drained = [model.heap.pop(model.now_s).item for _ in range(len(model.heap))]
    check(sorted(drained) == sorted(model.waiting), "drained", drained)


class _QueueModel:
    """A `WaitingHeap` and what it should hold."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.now_s = 0.0
        self.max_wait_s = rng.choice((None, 0.0, 3.0))
        worth = rng.choice((0.0, 0.0, 100.0))
        self.heap: WaitingHeap[str] = WaitingHeap(self._ordering(), self.max_wait_s, worth)
        self.waiting: dict[str, Entry[str]] = {}
        self.served: list[Entry[str]] = []
        self.added = 0

    def _ordering(self) -> Any:
        return ORDERINGS.build(self.rng.choice(tuple(ORDERINGS)))

    def _state(self) -> QueueState:
        rate = self.rng.choice((0.0, 1.0, 5e4, 1e300))
        return QueueState(self.now_s, rate, len(self.heap), self.heap.waiting_tokens)

    def operate(self) -> None:
        rng, heap = self.rng, self.heap
        self.now_s += rng.choice((0.0, rng.uniform(0, 5), 1e6))
        action = rng.choice(("add", "add", "add", "pop", "pop", "back", "abort", "order", "keys"))
        if action == "add":
            self.added += 1
            tokens = rng.choice((0, count(rng), 2**40))
            priority = rng.choice((0, 0, 1, -(2**40), 2**40))
            request = QueuedRequest(f"r{self.added}", self.now_s, tokens, priority)
            self.waiting[request.request_id] = heap.add(request, request.request_id, self._state())
        elif action == "pop" and self.waiting:
            expected = self._expected_head()
            popped = heap.pop(self.now_s)
            check(popped is expected, "popped", popped.item, "expected", expected.item)
            self.served.append(self.waiting.pop(popped.item))
        elif action == "back" and self.served:
            entry = self.served.pop(rng.randrange(len(self.served)))
            heap.restore(entry, front=rng.random() < 0.5)
            self.waiting[entry.item] = entry
        elif action == "abort" and self.waiting:
            name = rng.choice(list(self.waiting))
            check(heap.remove(name) is self.waiting.pop(name), "removed another than", name)
        elif action == "order":
            heap.reorder(self._ordering(), self._state(), self.max_wait_s)
        elif action == "keys":
            heap.refresh(self._state())

    def _expected_head(self) -> Entry[str]:
        heap = self.heap

        def rank(entry: Entry[str]) -> tuple[Any, ...]:
            request = entry.request
            level = 0 if heap.priority_tokens else request.priority
            return level, entry.lane, entry.key, request.arrival_s, entry.sequence

        head = min(self.waiting.values(), key=rank)
        if self.max_wait_s is None or head.lane == FRONT:
            return head
        mates = [e for e in self.waiting.values() if rank(e)[0] == rank(head)[0]]
        oldest = min(mates, key=lambda e: (e.queued_s, e.sequence))
        return oldest if self.now_s - oldest.queued_s > self.max_wait_s else head

    def compare(self) -> None:
        heap = self.heap
        check({e.item for e in heap} == set(self.waiting), "holds others than were put in")
        tokens = sum(e.request.uncached_tokens for e in self.waiting.values())
        check(heap.waiting_tokens == tokens, heap.waiting_tokens, "tokens, expected", tokens)


@dataclass(frozen=True)
class _Graphs:
    graph_tokens: int
    exploring: bool
    pays: bool
    flat_tokens: int

    def small_steps_pay(self, backlog_tokens: float) -> bool:
        return self.pays


def step(rng: random.Random) -> None:
    """One step's decision on a random engine: within the budget, and somebody moves on."""
    budget = rng.choice((1, 16, 512, 2048, 1 + count(rng, 2**17)))
    decoding = min(rng.choice((0, 0, count(rng, 64))), budget)
    running = _candidates(rng)
    graphs = _Graphs(count(rng), rng.random() < 0.2, rng.random() < 0.5, count(rng, 2**13))
    view = RecordedView(
        budget_tokens=budget,
        chunked=rng.random() < 0.9,
        held_back=rng.random() < 0.3,
        decoding=decoding,
        decode_tokens=decoding,
        running=running,
        may_yield=rng.random() < 0.8,
        newcomers=_candidates(rng),
        longest_chunk_tokens=rng.choice((0, 0, 1 + count(rng))),
        backlog_tokens=count(rng, 2**20),
        group_backlog_tokens=rng.choice((0.0, float(count(rng, 2**20)), 2.0**53)),
        group_decode_tokens=rng.choice((0.0, float(count(rng, 256)), 2.0**53)),
        group_prefill_share=rng.choice((0.0, 0.4, 1.0)),
        cost=StepCost(*(rng.choice((0.0, 5e-324, 1e3, 1e300)) for _ in range(3))),
        block_tokens=rng.choice((1, 16, 128)),
        oldest_wait_us=rng.choice((0.0, float(count(rng, 2**30)), 2.0**53)),
        graphs=rng.choice((None, graphs)),
    )
    config = QueueConfig(
        in_batch=rng.random() < 0.7,
        graph_steps=rng.choice((0.0, 2.0, 1e300)),
        step_budget=rng.random() < 0.7,
        slo_ttft_ms=rng.choice((0.0, 5e-324, 300.0, 1e300)),
        slo_tpot_ms=rng.choice((0.0, 5e-324, 50.0, 1e300)),
    )
    decision = decide(view, config)
    check(decision == decide(view, config), "two answers to one view")
    check(0 < decision.budget_tokens <= budget, "budget", decision.budget_tokens, "of", budget)
    if not decision.admit:
        check(view.held_back and decoding > 0, "no prefill in a step that nothing holds back")
    if decision.caps is None:
        return
    caps = decision.caps
    check(len(caps) == len(running), "caps", caps)
    check(all(0 <= c <= r.tokens for c, r in zip(caps, running, strict=True)), "caps", caps)
    left = max(0, decision.budget_tokens - decoding)
    check(sum(caps) <= max(left, LEAST_TOKENS), "caps", caps, "of", left)


def _candidates(rng: random.Random) -> tuple[PrefillCandidate, ...]:
    keys = (0.0, -1e24, 1e300, -math.inf, float(count(rng)))
    some = range(rng.choice((0, 1, 3)))
    return tuple(PrefillCandidate(rng.choice(keys), 1 + count(rng, 2**17)) for _ in some)


def dispatcher(rng: random.Random) -> None:
    """A front end's short life on random snapshots: a valid engine, and accounts that close."""
    engines = rng.randrange(1, 6)
    sane = rng.random() < 0.5
    policy = rng.choice(tuple(POLICIES))
    own = Dispatcher(
        engines,
        DispatchConfig(policy, prefix_chunks=64, prefix_chunk_tokens=4, sessions=4),
        client_count=rng.choice((1, 3)),
        feedback_weight=rng.choice((0.0, 1.0)),
        lock_step=rng.random() < 0.5,
    )
    board, now_us = np.zeros((engines, ROW_WIDTH)), 1e6
    open_requests: list[str] = []
    for number in range(rng.randrange(1, 8)):
        now_us += rng.choice((0.0, 1e3, 1e7))
        _scribble(rng, board, now_us, sane)
        tokens = [rng.randrange(8) for _ in range(rng.choice((0, 3, 20)))]
        length = len(tokens) if sane else rng.choice((len(tokens), 0, 2**40))
        session = rng.choice((None, "a", "\ud800", "x" * 1000))
        request = DispatchRequest(f"r{number % 5}", length, now_us, session, rng.choice((0, -9)))
        decision = own.dispatch(request, tokens or None, board.copy(), now_us)
        check(0 <= decision.engine < engines, "engine", decision.engine, "of", engines)
        check(decision.costs.shape == (engines,), "costs", decision.costs)
        open_requests.append(request.request_id)
        if sane:
            board[decision.engine, ACCEPTED_REQUESTS] += 1
            board[decision.engine, ACCEPTED_TOKENS] += length
        if rng.random() < 0.4:
            own.finished(open_requests.pop(rng.randrange(len(open_requests))))
        check(len(own.sessions) <= 4, len(own.sessions), "sessions")
    for request_id in (*open_requests, *open_requests, "unknown"):
        own.finished(request_id)
    check(not own.ledger.inflight.any(), "in flight for ever", own.ledger.inflight)
    if sane:
        board[:, Field.SEQUENCE] += 1
        own.ledger.observe(board, now_us)
        check(not own.ledger.unacked.any(), "unacknowledged for ever", own.ledger.unacked)


def _scribble(rng: random.Random, board: Any, now_us: float, sane: bool) -> None:
    """The next snapshots: plausible ones, or with numbers that no engine publishes.

    All are finite, not negative and at most `LARGEST`: others are refused where rows enter
    (target `rows`).
    """
    for row in board:
        row[Field.SEQUENCE] += 1
        row[Field.EPOCH] = 1.0
        row[Field.TIMESTAMP_US] = now_us - rng.choice((0.0, 1e4))
        for field in (Field.WAITING_PREFILL_TOKENS, Field.RUNNING_REQUESTS, Field.STEP_TIME_US):
            row[field] = count(rng, 2**17)
        row[Field.STEP_BASE_US], row[Field.PREFILL_US_PER_TOKEN] = rng.choice(((0, 0), (9e3, 3.0)))
    if not sane:
        for _ in range(rng.randrange(4)):
            row = rng.choice(board)
            row[rng.randrange(ROW_WIDTH)] = rng.choice((0.0, 5e-324, 1e9, LARGEST))


_BASE_US, _DECODE_US, _PREFILL_US = 8000.0, 20.0, 5.0
_NO_NUMBERS = (math.nan, math.inf, -math.inf, -1.0)


def online_cost(rng: random.Random) -> None:
    """Absurd observations change nothing for good: 500 clean steps later the estimate is right."""
    cost = OnlineStepCost(2048)

    def clean(steps: int) -> None:
        for _ in range(steps):
            decodes, prefill = rng.randrange(64), rng.choice((0, 0, 512, 2048))
            us = _BASE_US + _DECODE_US * decodes + _PREFILL_US * prefill
            cost.observe(prefill, decodes, us * rng.uniform(0.98, 1.02), float(prefill))

    clean(known := rng.choice((0, 5, 200)))
    stall_us = 1e8 if known > WARM_STEPS else 1e5  # before that nothing tells a stall from a step
    for _ in range(rng.randrange(1, 5)):
        group = rng.choice((None, *_NO_NUMBERS, 0.0, 1e6))
        duration = rng.choice((_BASE_US, *_NO_NUMBERS, 5e-324, stall_us))
        cost.observe(count(rng, 2048), count(rng, 64), duration, group)
        learned = (cost.prefill_us_per_token, cost.decode_us_per_request, cost.step_base_us(9))
        check(all(math.isfinite(v) and v >= 0 for v in learned), "learned", learned)
    clean(500)
    expected = _BASE_US + 32 * _DECODE_US + 2048 * _PREFILL_US
    found = cost.predict_us(2048, 32)
    off = 2.0 if known > WARM_STEPS else 4.0  # an estimate that began with stalls keeps some of it
    check(1 / off < found / expected < off, "a step of", expected, "us predicted as", found)


@lru_cache(maxsize=1)
def _constants() -> CostConstants:
    return cost_constants(ModelFacts(196_608.0, 2, 512.0, True, GATHER_BACKEND, 300))


def planner(rng: random.Random) -> None:
    """Random counts, zeros, one-hot, huge, and none at all: a valid map with finite figures."""
    per_source = rng.choice((1, 2))
    ranks = per_source * rng.randrange(1, 4)
    per_rank = rng.randrange(1, 6)
    experts = rng.randrange(per_rank, ranks * per_rank + 1)
    layers = rng.randrange(1, 3)
    topology = Topology(ranks, per_rank, per_source, rng.choice((per_source, 8)))
    current = placement(layers, topology.slots, experts)
    routing, wrong = _routing(rng, (ranks // per_source, layers, experts))
    placer = rng.choice(tuple(PLACERS))
    config = PlacementConfig(
        placer,
        gate=rng.choice((0.0, 1.0)),
        gamma=rng.choice((0.0, 1.0)),
    )
    backend = ROUTED_BACKEND if rng.random() < 0.5 else GATHER_BACKEND
    own = Planner(config, _constants(), backend, 300)
    scale = rng.choice((0.0, 1.0, 1e6))
    decision = own.decide(routing, topology, current, scale, rng.choice((1.0, 3.0)))
    check(not wrong, "took counts that are", wrong)
    array = decision.placement
    check(array.shape == current.shape, "shape", array.shape)
    held = [set(row) == set(range(experts)) for row in array.tolist()]
    check(all(held), "experts left out or made up", array.tolist())
    if placer == "gimbal":
        check(verify.problems(array, topology, layers, experts) is None, "not safe to commit")
    if decision.commit:
        figures = (decision.gain_us_per_step, decision.stall_us)
        check(all(math.isfinite(value) for value in figures), "committed with", figures)


def _routing(rng: random.Random, shape: tuple[int, int, int]) -> tuple[RoutingCounts, str]:
    """Counts, and what is wrong with them if anything is."""
    random_counts = np.random.default_rng(rng.getrandbits(32)).pareto(1.0, shape)
    kind = rng.choice(("random", "random", "zeros", "one-hot", "huge", "tiny", "NaN", "negative"))
    if kind in ("random", "tiny"):
        counts = np.floor(random_counts * 100) if kind == "random" else random_counts * 1e-300
    elif kind == "huge":
        counts = random_counts * rng.choice((1e15, 1e300))
    else:
        counts = np.zeros(shape)
        worth = {"zeros": 0.0, "one-hot": 1e4, "NaN": math.nan, "negative": -1.0}[kind]
        counts[tuple(rng.randrange(n) for n in shape)] = worth
    routing = RoutingCounts(counts, steps=rng.choice((1, 50)))
    if rng.random() < 0.3:
        routing = replace(routing, active=np.clip(random_counts, 0.0, 1.0))
    return routing, kind if kind in ("NaN", "negative") else ""
