"""Cost of a snapshot, of reading the board, and of the two sides of the hook around a decision.

Bounds: a snapshot at most 10 us with 10,000 waiting requests; reading the board is part of a
decision's 15 us with 8 engines and 60 us with 64.

Run: .venv/bin/pytest benchmarks/bench_board.py; with up to 256 engines, and rows of other hosts, by
`make bench-scale`.
"""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from gimbal.board.file import Board, board_directory, board_path
from gimbal.board.slots import BoardReader, SlotWriter
from gimbal.core.contracts import EngineLoads
from gimbal.core.snapshot import ROW_WIDTH, Field

ROUNDS = 20_000
LARGE = [pytest.param(n, marks=pytest.mark.scale) for n in (128, 256)]


@pytest.fixture
def board() -> Iterator[Board]:
    folder = Path(tempfile.mkdtemp(prefix="gimbal-bench-", dir=board_directory()))
    yield Board(board_path("bench", folder))
    shutil.rmtree(folder)


def waiting_scheduler(waiting: int) -> Any:
    """What `SchedulerSignals` reads of a scheduler with `waiting` requests and 64 running."""
    pool = SimpleNamespace(num_gpu_blocks=10_001, get_num_free_blocks=lambda: 5_000)
    vllm_config = SimpleNamespace(
        compilation_config=SimpleNamespace(cudagraph_mode=None),
        parallel_config=SimpleNamespace(data_parallel_size=1),
    )
    return SimpleNamespace(
        vllm_config=vllm_config,
        scheduler_config=SimpleNamespace(max_num_batched_tokens=8192),
        max_num_active_reqs=1024,
        kv_cache_manager=SimpleNamespace(
            block_pool=pool, get_computed_blocks=lambda request: (None, 0, 0)
        ),
        block_size=16,
        num_spec_tokens=0,
        enable_kv_cache_events=False,
        connector=None,
        requests={},
        running=[],
        waiting=list(range(waiting)),
        kv_holding_waiting=[],
        get_request_counts=lambda: (64, waiting),
    )


@pytest.mark.parametrize("waiting", [0, 10_000])
def test_snapshot(benchmark: Any, board: Board, waiting: int) -> None:
    """One `SchedulerSignals.publish` into shared memory."""
    from gimbal.board.clock import now_us
    from gimbal.vllm_plugin.engine.signals import SchedulerSignals

    signals = SchedulerSignals(waiting_scheduler(waiting), SlotWriter(board, 0))
    for index in range(waiting):
        signals.enqueued(
            SimpleNamespace(request_id=str(index), num_computed_tokens=0, num_tokens=100)
        )
    benchmark.pedantic(lambda: signals.publish(now_us()), rounds=ROUNDS, warmup_rounds=100)
    assert signals.row[3] == waiting


@pytest.mark.parametrize("engines", [2, 8, 64, *LARGE])
@pytest.mark.parametrize("changed", [False, True])
def test_read(benchmark: Any, board: Board, engines: int, changed: bool) -> None:
    """One read of all engines, with one new snapshot in between or with none."""
    writers = [SlotWriter(board, slot) for slot in range(engines)]
    row = np.random.default_rng(0).random(ROW_WIDTH)
    for writer in writers:
        writer.publish(row)
    reader = BoardReader(board, engines)

    def prepare() -> None:
        if changed:
            writers[0].publish(row)

    benchmark.pedantic(reader.read, setup=prepare, rounds=ROUNDS, warmup_rounds=100)
    assert np.array_equal(reader.read()[engines - 1], row)


@pytest.mark.parametrize("engines", [8, 64, *LARGE])
def test_route(benchmark: Any, board: Board, engines: int, monkeypatch: Any) -> None:
    """The whole hook around one new request: board, policy, metrics and vLLM's own bookkeeping.

    Every decision finds one new snapshot. vLLM's own choice over as many engines takes part of
    this time too: it is what the hook replaces.
    """
    pytest.importorskip("vllm")
    from collections import Counter

    from vllm import SamplingParams
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.core_client import DPLBAsyncMPClient

    from gimbal.board.clock import now_us
    from gimbal.core.compiled import compile_kernels
    from gimbal.core.config import parse_config
    from gimbal.vllm_plugin.dispatch.hook import FrontEnd

    client = DPLBAsyncMPClient.__new__(DPLBAsyncMPClient)
    client.client_count, client.client_index = 1, 0
    client.vllm_config = SimpleNamespace(model_config=SimpleNamespace(served_model_name="m"))
    client.reqs_in_flight, client.engine_inflight = {}, Counter()
    client.streaming_reqs = set()
    client.engine_ranks_managed = list(range(engines))
    client.core_engines = [rank.to_bytes(2, "little") for rank in range(engines)]
    client.lb_engines = [[0, 0, 0.0] for _ in range(engines)]
    client.eng_start_index = 0
    front_end = FrontEnd(client, parse_config({"levels": ["dispatch"]}), board)
    monkeypatch.setattr(front_end, "_start_refresh", lambda: None)
    compile_kernels()  # waits for what the front end has begun in the background
    original = DPLBAsyncMPClient.get_core_engine_for_request
    writers = [SlotWriter(board, slot) for slot in range(engines)]
    row = np.zeros(ROW_WIDTH)
    sampling = SamplingParams(max_tokens=1)
    count = 0

    def prepare() -> tuple[tuple[Any, Any, Any], dict[str, Any]]:
        nonlocal count
        count += 1
        front_end.dispatcher.settle()  # the event loop does this after the request has left
        row[Field.SEQUENCE], row[Field.TIMESTAMP_US] = count, now_us()
        writers[count % engines].publish(row)
        tokens = list(range(count * 1000, count * 1000 + 1000))
        request = EngineCoreRequest(
            f"r{count}", tokens, None, sampling, None, 0.0, None, None, None
        )
        return (client, request, original), {}

    benchmark.pedantic(front_end.route, setup=prepare, rounds=5000, warmup_rounds=200)
    assert front_end.guard.counts == {}
    assert len(client.reqs_in_flight) == count


def busy_loads(engines: int, number: int) -> EngineLoads:
    """Engines of which every column has changed since the snapshot before `number`."""
    board = np.random.default_rng(number).integers(1, 1000, (engines, ROW_WIDTH)).astype(float)
    board += 1000.0 * number
    board[:, Field.EPOCH] = 1.0
    accounts = board[:, Field.RUNNING_TOKENS].copy()
    return EngineLoads(board, *(accounts for _ in range(7)))


@pytest.mark.parametrize("engines", [8, 64, *LARGE])
@pytest.mark.parametrize("where", ["loop", "scrape"])
def test_metrics(benchmark: Any, engines: int, where: str) -> None:
    """What an API server's event loop does twice a second, and a thread at each scrape.

    With PROMETHEUS_MULTIPROC_DIR set it is what one of several API servers does.
    """
    pytest.importorskip("prometheus_client")
    from gimbal.vllm_plugin.dispatch.metrics import dispatch_metrics

    metrics, number = dispatch_metrics(), 0
    metrics.serve(f"{where} {engines}", range(engines))
    metrics.at_scrape = True

    def prepare() -> tuple[tuple[int, EngineLoads, None], dict[str, Any]]:
        nonlocal number
        number += 1
        return (0, busy_loads(engines, number), None), {}

    act = metrics.refresh if where == "loop" else metrics.show
    benchmark.pedantic(act, setup=prepare, rounds=50, warmup_rounds=2)


SENDER = """
import sys, time, numpy
from gimbal.core.snapshot import ROW_WIDTH
from gimbal.vllm_plugin.engine.remote import RowSender
address, engines, rate = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
senders = [RowSender(address, engine) for engine in range(engines)]
row, sent = numpy.ones(ROW_WIDTH), 0
time.sleep(1)
start = time.perf_counter()
while True:
    while sent < (time.perf_counter() - start) * rate:
        senders[sent % engines].publish(row)
        sent += 1
    time.sleep(0.001)
"""
"""A process that publishes `rate` rows a second, of all engines in turn."""


@pytest.mark.scale
@pytest.mark.parametrize("work", [0.0, 0.5], ids=["idle-loop", "half-busy-loop"])
@pytest.mark.parametrize("rate", [2_500, 10_000, 40_000])
def test_rows_of_other_hosts(benchmark: Any, board: Board, rate: int, work: float) -> None:
    """Rows a second that the head's thread takes in, its share of a core, and what its event loop
    has of that: how late it wakes, and how much of the work that it wants to do it does."""
    from gimbal.vllm_plugin.engine.remote import RowReceiver

    receiver = RowReceiver(board, "tcp://127.0.0.1:0")
    command = [sys.executable, "-c", SENDER, receiver.address, "248", str(rate)]
    sender, span_s = subprocess.Popen(command), 4.0
    clock = time.pthread_getcpuclockid(receiver._thread.ident or 0)

    async def loop() -> tuple[list[float], float]:
        late, end = [], time.perf_counter() + span_s
        while (now := time.perf_counter()) < end:
            await asyncio.sleep(0.002)
            late.append(time.perf_counter() - now - 0.002)
            until = time.thread_time() + 0.002 * work / (1 - work)
            while time.thread_time() < until:
                pass
        return late, len(late) * 0.002 * work / (1 - work)

    def measured() -> None:
        cpu, rows = time.clock_gettime(clock), receiver.received
        late, worked = asyncio.run(loop())
        benchmark.extra_info |= {
            "written_per_s": (receiver.received - rows) / span_s,
            "core_share": (time.clock_gettime(clock) - cpu) / span_s,
            "loop_work_share": worked / span_s,
            "loop_late_ms_p50_p99": (1e3 * np.percentile(late, [50, 99])).round(2).tolist(),
        }

    try:
        deadline = time.monotonic() + 60
        while not receiver.received:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        time.sleep(1)
        benchmark.pedantic(measured, rounds=1)
    finally:
        sender.kill()
        sender.wait()
        receiver.close()
    print(f"\n{rate} rows/s: {benchmark.extra_info}")
