"""What one dispatch decision costs, and the memory of the prefix index.

    pytest benchmarks/bench_dispatch.py --benchmark-columns=median,iqr,ops

Targets: a decision at most 15 us median with 8 engines and 60 us with 64, terms recorded, with 1 M
chunks in the prefix index; the index in at most 200 MB. `dispatch` is what a request waits for;
`settle` enters its prompt into the index afterwards.
"""

from __future__ import annotations

import gc
import random
import tracemalloc
from functools import lru_cache

import numpy as np
import pytest

from gimbal.core.compiled import compile_kernels
from gimbal.core.config import DispatchConfig
from gimbal.core.contracts import DispatchRequest
from gimbal.core.cost.online import OnlineStepCost
from gimbal.core.dispatch import POLICIES
from gimbal.core.dispatch.dispatcher import Dispatcher
from gimbal.core.dispatch.ledger import Ledger
from gimbal.core.dispatch.prefix_index import PrefixIndex
from gimbal.core.snapshot import ACCEPTED_REQUESTS, ACCEPTED_TOKENS, ROW_WIDTH, Field

CHUNKS = 1_000_000
PROMPTS = 64
ENGINES = [8, 64, *(pytest.param(n, marks=pytest.mark.scale) for n in (128, 256, 320))]
"""The large ones are `make bench-scale`'s."""


def busy_board(engines: int) -> np.ndarray:
    """Engines in the middle of work, all a little different."""
    rng = np.random.default_rng(1)
    board = np.zeros((engines, ROW_WIDTH))
    limits = {
        Field.WAITING_REQUESTS: 5,
        Field.WAITING_PREFILL_TOKENS: 2000,
        Field.RUNNING_REQUESTS: 40,
        Field.RUNNING_PREFILL_TOKENS: 300,
        Field.DECODING_REQUESTS: 38,
        Field.RUNNING_TOKENS: 30_000,
        Field.KV_BLOCKS_USED: 5000,
        Field.EXPERT_PRESSURE_US: 300,
    }
    for field, limit in limits.items():
        board[:, field] = rng.integers(0, limit, engines)
    constants = {
        Field.EPOCH: 1,
        Field.KV_BLOCKS_TOTAL: 10_000,
        Field.KV_BLOCK_TOKENS: 16,
        Field.STEP_BASE_US: 6000,
        Field.PREFILL_US_PER_TOKEN: 12,
        Field.DECODE_US_PER_REQUEST: 60,
        Field.PREFILL_TOKENS_PER_S: 50_000,
        Field.STEP_TOKEN_BUDGET: 2048,
        Field.MAX_RUNNING_REQUESTS: 256,
    }
    for field, value in constants.items():
        board[:, field] = value
    return board


def fill(index: PrefixIndex, chunks: int) -> None:
    """Enters `chunks` chunk names without hashing prompts for them."""
    rng = random.Random(2)
    engines = index.engines
    for start in range(0, chunks, 1000):
        names = [rng.getrandbits(60) for _ in range(min(1000, chunks - start))]
        index.insert_hashes(names, start // 1000 % engines)


@pytest.fixture(scope="module")
def prompts() -> dict[int, list[list[int]]]:
    rng = random.Random(3)
    return {
        length: [[rng.randrange(150_000) for _ in range(length)] for _ in range(PROMPTS)]
        for length in (217, 3000)
    }


@lru_cache(maxsize=2)
def full_index(engines: int) -> PrefixIndex:
    """An index of 1 M chunks, made once per number of engines."""
    index = PrefixIndex(engines, CHUNKS)
    fill(index, CHUNKS)
    return index


class Server:
    """A dispatcher whose engines acknowledge everything before the next decision."""

    def __init__(self, engines: int, policy: str, prompts: list[list[int]], seen: bool) -> None:
        self.dispatcher = Dispatcher(engines, DispatchConfig(policy=policy), feedback_weight=1.0)
        compile_kernels()  # a server does so in the background
        self.dispatcher.prefixes = full_index(engines)
        self.board = busy_board(engines)
        self.prompts = prompts
        self.number = 0
        for number, prompt in enumerate(prompts):
            if seen:
                self.dispatcher.prefixes.insert(prompt, number % engines)
            else:
                for engine in range(engines):
                    self.dispatcher.prefixes.remove_hashes(
                        self.dispatcher.prefixes.chunk_names(prompt), engine
                    )

    def prepare(self):
        """One fresh snapshot and request; the previous prompt enters the index untimed."""
        dispatcher, board = self.dispatcher, self.board
        dispatcher._unsettled = None  # a prompt not `seen` stays so
        dispatcher.finished(str(self.number - 50))
        self.number += 1
        board[:, Field.SEQUENCE] = self.number
        board[:, Field.TIMESTAMP_US] = self.number * 1000.0
        board[:, ACCEPTED_REQUESTS] += dispatcher.ledger.unacked[0]
        board[:, ACCEPTED_TOKENS] += dispatcher.ledger.unacked[1]
        prompt = self.prompts[self.number % PROMPTS]
        now_us = self.number * 1000.0 + 500
        request = DispatchRequest(str(self.number), len(prompt), now_us)
        return (request, prompt, board, now_us), {}


@pytest.mark.parametrize("seen", [False, True], ids=["new-prompt", "cached-prompt"])
@pytest.mark.parametrize("length", [217, 3000])
@pytest.mark.parametrize("engines", ENGINES)
def test_decision(benchmark, prompts, engines, length, seen):
    server = Server(engines, "gimbal", prompts[length], seen)
    gc.freeze()  # 1 M long-lived integers are not what is measured
    benchmark.pedantic(server.dispatcher.dispatch, setup=server.prepare, rounds=3000)


@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "gimbal"])
def test_decision_of_baselines(benchmark, prompts, policy):
    server = Server(8, policy, prompts[217], False)
    benchmark.pedantic(server.dispatcher.dispatch, setup=server.prepare, rounds=2000)


@pytest.mark.parametrize("length", [217, 3000])
def test_settle(benchmark, prompts, length):
    server = Server(8, "gimbal", prompts[length], False)

    def setup():
        arguments, _ = server.prepare()
        server.dispatcher.dispatch(*arguments)
        return (), {}

    benchmark.pedantic(server.dispatcher.settle, setup=setup, rounds=2000)


@pytest.mark.parametrize("engines", ENGINES)
def test_ledger_observe(benchmark, engines):
    ledger, board = Ledger(engines), busy_board(engines)

    def setup():
        board[:, Field.SEQUENCE] += 1
        return (board,), {}

    benchmark.pedantic(ledger.observe, setup=setup, rounds=5000)


def test_ledger_sent_and_finished(benchmark):
    ledger = Ledger(8)

    def one():
        ledger.sent("a", 3, 217)
        ledger.finished("a")
        ledger._cached.clear()

    benchmark(one)


@pytest.mark.parametrize("length", [217, 3000])
def test_prefix_match_and_insert(benchmark, prompts, length):
    index = full_index(8)
    numbers = iter(range(10**9))

    def one():
        number = next(numbers) % PROMPTS
        index.insert(index.match(prompts[length][number]), number % 8)

    benchmark(one)


def test_online_cost_step(benchmark):
    model = OnlineStepCost(2048)
    rng = random.Random(4)
    steps = [(rng.randrange(2048), rng.randrange(64), rng.uniform(5e3, 4e4)) for _ in range(256)]
    numbers = iter(range(10**9))
    benchmark(lambda: model.observe(*steps[next(numbers) % 256]))


@pytest.mark.parametrize("engines", [8, 64])
def test_memory_of_a_full_index(benchmark, engines):
    def megabytes() -> float:
        tracemalloc.start()
        # Shards turn over at different times: three quarters of the capacity are held on average.
        index = PrefixIndex(engines, CHUNKS * 4 // 3)
        fill(index, 2 * CHUNKS)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        benchmark.extra_info["chunks"] = len(index)
        return peak / 1e6

    peak = benchmark.pedantic(megabytes, rounds=1)
    benchmark.extra_info["peak_mb"] = peak
    print(f"\n{engines} engines: {benchmark.extra_info['chunks']} chunks, peak {peak:.0f} MB")
    assert benchmark.extra_info["chunks"] >= 0.95 * CHUNKS
    assert peak <= 200
