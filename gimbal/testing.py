"""Fakes for tests of policies: engines in lock step, their board, and workloads for them.

`FakeGroup` is a toy, not the simulator: a step's time is linear in its tokens, output lengths are
given, memory is a token count. It exists to see in a second what a dispatch policy does to a queue.
"""

from __future__ import annotations

import heapq
import random
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean, quantiles

import numpy as np

from gimbal.core.config import DispatchConfig
from gimbal.core.contracts import DispatchRequest, FloatArray
from gimbal.core.dispatch.dispatcher import Dispatcher
from gimbal.core.snapshot import ACCEPTED_REQUESTS, ACCEPTED_TOKENS, ROW_WIDTH, Field

_BLOCK_TOKENS = 16


@dataclass(slots=True)
class FakeRequest:
    """One request of a workload; the engine fills in the lower part.

    Attributes:
        prefix: name of the content its first `prefix_tokens` tokens share with others, or None.
    """

    request_id: str
    arrival_us: float
    prompt_tokens: int
    output_tokens: int
    prefix: int | None = None
    prefix_tokens: int = 0
    session: str | None = None

    engine: int = -1
    uncached_tokens: int = 0
    left_to_prefill: int = 0
    produced_tokens: int = 0
    first_token_us: float = 0.0
    finished_us: float = 0.0

    @property
    def ttft_us(self) -> float:
        """Arrival to first token."""
        return self.first_token_us - self.arrival_us

    @property
    def tpot_us(self) -> float:
        """Mean time between its tokens; 0 for a single one."""
        return (self.finished_us - self.first_token_us) / max(1, self.output_tokens - 1)

    def token_ids(self) -> list[int]:
        """A prompt that shares exactly what it should with others."""
        shared = (self.prefix or 0) * (1 << 17)
        own = shared + self.prefix_tokens  # the next turn repeats it
        if self.session is None:
            own = (1 << 40) + int(self.request_id) * (1 << 17)
        return [
            *range(shared, shared + self.prefix_tokens),
            *range(own, own + self.prompt_tokens - self.prefix_tokens),
        ]


@dataclass(frozen=True, slots=True)
class FakeMachine:
    """What a step costs: ``base + decode * decoding requests + token * prefill tokens``."""

    engines: int = 2
    step_token_budget: int = 512
    base_us: float = 20_000.0
    token_us: float = 900.0
    decode_us: float = 1_000.0
    max_running: int = 256
    kv_tokens: int = 100_000

    def capacity_tokens_per_s(self) -> float:
        """Prefill tokens per second of one engine when every step is full."""
        return 1e6 / (self.token_us + self.base_us / self.step_token_budget)


@dataclass(slots=True)
class _FakeEngine:
    waiting: deque[FakeRequest] = field(default_factory=deque)
    running: list[FakeRequest] = field(default_factory=list)
    cache: OrderedDict[int, int] = field(default_factory=OrderedDict)
    cached_tokens: int = 0
    context_tokens: int = 0
    prefilled_tokens: int = 0

    def cached(self, request: FakeRequest) -> int:
        if request.prefix is None:
            return 0
        held = min(self.cache.get(request.prefix, 0), request.prefix_tokens)
        return min(held // _BLOCK_TOKENS * _BLOCK_TOKENS, request.prompt_tokens - 1)

    def remember(self, prefix: int, tokens: int, room: int) -> None:
        before = self.cache.get(prefix, 0)
        self.cache[prefix] = max(tokens, before)
        self.cached_tokens += self.cache[prefix] - before
        self.cache.move_to_end(prefix)
        while self.cache and self.cached_tokens > room:
            self.cached_tokens -= self.cache.popitem(last=False)[1]


class FakeGroup:
    """Data-parallel engines in lock step behind one dispatcher.

    Args:
        machine: sizes and speeds.
        dispatcher: chooses the engine; `front_end` must be 0.
    """

    def __init__(self, machine: FakeMachine, dispatcher: Dispatcher) -> None:
        self.machine = machine
        self.dispatcher = dispatcher
        self.engines = [_FakeEngine() for _ in range(machine.engines)]
        self.board: FloatArray = np.zeros((machine.engines, ROW_WIDTH))
        self.board[:, Field.EPOCH] = 1
        self.now_us = 0.0
        self.steps = 0
        self._inbox: list[list[FakeRequest]] = [[] for _ in self.engines]

    def run(self, requests: Iterable[FakeRequest]) -> list[FakeRequest]:
        """Serves `requests` (sorted by arrival) to the end; returns them as they finished."""
        arrivals = deque(requests)
        done: list[FakeRequest] = []
        self._publish()
        while arrivals or self._busy():
            if not self._busy():
                self.now_us = max(self.now_us, arrivals[0].arrival_us)
            self._dispatch_until(arrivals, self.now_us)
            self._accept()
            self._publish()
            work = [self._schedule(engine) for engine in self.engines]
            machine = self.machine
            duration = machine.base_us + max(
                machine.token_us * tokens + machine.decode_us * decodes for tokens, decodes in work
            )
            self._dispatch_until(arrivals, self.now_us + duration)
            self.now_us += duration
            self.steps += 1
            for engine in self.engines:
                done.extend(self._advance(engine))
        return done

    def _busy(self) -> bool:
        return any(e.waiting or e.running for e in self.engines) or any(self._inbox)

    def _dispatch_until(self, arrivals: deque[FakeRequest], until_us: float) -> None:
        while arrivals and arrivals[0].arrival_us <= until_us:
            request = arrivals.popleft()
            decision = self.dispatcher.dispatch(
                DispatchRequest(
                    request.request_id,
                    request.prompt_tokens,
                    request.arrival_us,
                    request.session,
                ),
                request.token_ids(),
                self.board,
                max(request.arrival_us, self.now_us),
            )
            request.engine = decision.engine
            self._inbox[request.engine].append(request)

    def _accept(self) -> None:
        for index, inbox in enumerate(self._inbox):
            engine = self.engines[index]
            for request in inbox:
                request.uncached_tokens = request.prompt_tokens - engine.cached(request)
                engine.waiting.append(request)
                self.board[index, ACCEPTED_REQUESTS] += 1
                self.board[index, ACCEPTED_TOKENS] += request.prompt_tokens
            inbox.clear()

    def _schedule(self, engine: _FakeEngine) -> tuple[int, int]:
        """Gives this step's tokens to `engine`; returns its prefill tokens and decodes."""
        machine = self.machine
        decodes = sum(1 for r in engine.running if r.left_to_prefill == 0)
        room = machine.step_token_budget - decodes
        given = 0
        for request in engine.running:
            if request.left_to_prefill > 0 and room > given:
                given += self._prefill(request, room - given)
        while engine.waiting and room > given and len(engine.running) < machine.max_running:
            request = engine.waiting[0]
            if engine.context_tokens + request.prompt_tokens > machine.kv_tokens:
                break
            engine.waiting.popleft()
            cached = engine.cached(request)
            request.left_to_prefill = request.uncached_tokens = request.prompt_tokens - cached
            engine.context_tokens += request.prompt_tokens
            engine.running.append(request)
            if request.prefix is not None:
                self._remember(engine, request.prefix, request.prefix_tokens)
            given += self._prefill(request, room - given)
        engine.prefilled_tokens += given
        return given, decodes

    def _prefill(self, request: FakeRequest, room: int) -> int:
        tokens = min(request.left_to_prefill, room)
        request.left_to_prefill -= tokens
        if request.left_to_prefill == 0:
            request.left_to_prefill = -1  # its first token comes out of this step
        return tokens

    def _advance(self, engine: _FakeEngine) -> list[FakeRequest]:
        done, still = [], []
        for request in engine.running:
            if request.left_to_prefill <= 0:
                if request.left_to_prefill < 0:
                    request.left_to_prefill = 0
                    request.first_token_us = self.now_us
                request.produced_tokens += 1
                engine.context_tokens += 1
            if request.produced_tokens >= request.output_tokens:
                request.finished_us = self.now_us
                engine.context_tokens -= request.prompt_tokens + request.produced_tokens
                if request.prefix is not None and request.session is not None:
                    self._remember(
                        engine, request.prefix, request.prompt_tokens + request.produced_tokens
                    )
                self.dispatcher.finished(request.request_id)
                done.append(request)
            else:
                still.append(request)
        engine.running = still
        return done

    def _remember(self, engine: _FakeEngine, prefix: int, tokens: int) -> None:
        engine.remember(prefix, tokens, self.machine.kv_tokens - engine.context_tokens)

    def _publish(self) -> None:
        machine = self.machine
        for index, engine in enumerate(self.engines):
            row = self.board[index]
            decoding = sum(1 for r in engine.running if r.left_to_prefill == 0)
            row[Field.SEQUENCE] = self.steps + 1
            row[Field.TIMESTAMP_US] = self.now_us
            row[Field.WAITING_REQUESTS] = len(engine.waiting)
            row[Field.WAITING_PREFILL_TOKENS] = sum(r.uncached_tokens for r in engine.waiting)
            row[Field.RUNNING_REQUESTS] = len(engine.running)
            row[Field.RUNNING_PREFILL_TOKENS] = sum(
                max(0, r.left_to_prefill) for r in engine.running
            )
            row[Field.DECODING_REQUESTS] = decoding
            row[Field.KV_BLOCKS_USED] = engine.context_tokens // _BLOCK_TOKENS
            row[Field.KV_BLOCKS_TOTAL] = machine.kv_tokens // _BLOCK_TOKENS
            row[Field.KV_BLOCK_TOKENS] = _BLOCK_TOKENS
            row[Field.STEP_BASE_US] = machine.base_us + machine.decode_us * decoding
            row[Field.PREFILL_US_PER_TOKEN] = machine.token_us
            row[Field.DECODE_US_PER_REQUEST] = machine.decode_us
            row[Field.PREFILL_TOKENS_PER_S] = engine.prefilled_tokens * 1e6 / max(1.0, self.now_us)
            row[Field.STEP_TOKEN_BUDGET] = machine.step_token_budget
            row[Field.RUNNING_TOKENS] = engine.context_tokens
            row[Field.MAX_RUNNING_REQUESTS] = machine.max_running
            row[Field.PENDING_PREFIX_HIT_TOKENS] = sum(
                r.prompt_tokens - r.uncached_tokens for r in engine.waiting
            )


@dataclass(frozen=True, slots=True)
class FakeResult:
    """Latencies of one run, seconds, without the first tenth (the engines start empty)."""

    ttft_mean_s: float
    ttft_p50_s: float
    ttft_p99_s: float
    tpot_mean_s: float
    duration_s: float
    computed_tokens: int


def serve(
    machine: FakeMachine,
    policy: str,
    requests: Sequence[FakeRequest],
    *,
    feedback_weight: float = 0.0,
) -> FakeResult:
    """Serves copies of `requests` on a fresh `FakeGroup` under the named policy."""
    dispatcher = Dispatcher(
        machine.engines, DispatchConfig(policy=policy), feedback_weight=feedback_weight
    )
    group = FakeGroup(machine, dispatcher)
    done = group.run(
        FakeRequest(
            r.request_id,
            r.arrival_us,
            r.prompt_tokens,
            r.output_tokens,
            r.prefix,
            r.prefix_tokens,
            r.session,
        )
        for r in requests
    )
    done.sort(key=lambda r: r.arrival_us)
    settled = done[len(done) // 10 :]
    ttft = [r.ttft_us / 1e6 for r in settled]
    tpot = [r.tpot_us / 1e6 for r in settled if r.output_tokens > 1]
    percentiles = quantiles(ttft, n=100)
    return FakeResult(
        ttft_mean_s=fmean(ttft),
        ttft_p50_s=percentiles[49],
        ttft_p99_s=percentiles[98],
        tpot_mean_s=fmean(tpot),
        duration_s=group.now_us / 1e6,
        computed_tokens=sum(r.uncached_tokens for r in done),
    )


def poisson_requests(
    lengths: Sequence[tuple[int, int]], rate_per_s: float, count: int, seed: int
) -> list[FakeRequest]:
    """Unrelated prompts with (prompt, output) lengths drawn from `lengths`."""
    rng = random.Random(seed)
    now_us, requests = 0.0, []
    for number in range(count):
        now_us += rng.expovariate(rate_per_s) * 1e6
        prompt, output = rng.choice(lengths)
        requests.append(FakeRequest(str(number), now_us, max(1, prompt), max(1, output)))
    return requests


def shared_prefix_requests(
    prefixes: int,
    prefix_tokens: int,
    lengths: Sequence[tuple[int, int]],
    rate_per_s: float,
    count: int,
    seed: int,
) -> list[FakeRequest]:
    """As `poisson_requests`, each behind one of `prefixes` shared system prompts (Zipf-popular)."""
    rng = random.Random(seed)
    weights = [1.0 / (rank + 1) for rank in range(prefixes)]
    requests = poisson_requests(lengths, rate_per_s, count, seed)
    for request in requests:
        request.prefix = 1 + rng.choices(range(prefixes), weights)[0]
        request.prefix_tokens = prefix_tokens
        request.prompt_tokens += prefix_tokens
    return requests


def conversation_requests(
    lengths: Sequence[tuple[int, int]],
    rate_per_s: float,
    count: int,
    seed: int,
    *,
    turns: int = 5,
    think_s: float = 20.0,
) -> list[FakeRequest]:
    """Conversations of `turns` turns; every prompt repeats what was said before."""
    rng = random.Random(seed)
    heap: list[tuple[float, int, int, int]] = []  # (time, session, turn, context so far)
    now_us = 0.0
    for session in range(-(-count // turns)):
        now_us += rng.expovariate(rate_per_s / turns) * 1e6
        heapq.heappush(heap, (now_us, session, 0, 0))
    requests: list[FakeRequest] = []
    while heap and len(requests) < count:
        at_us, session, turn, context = heapq.heappop(heap)
        prompt, output = rng.choice(lengths)
        requests.append(
            FakeRequest(
                str(len(requests)),
                at_us,
                context + max(1, prompt),
                max(1, output),
                1 + session,
                context,
                f"session-{session}",
            )
        )
        if turn + 1 < turns:
            later = at_us + rng.expovariate(1 / think_s) * 1e6
            heapq.heappush(heap, (later, session, turn + 1, context + prompt + output))
    return requests
