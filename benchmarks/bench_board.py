"""Cost of a snapshot, of reading the board, and of the two sides of the hook around a decision.

Bounds: a snapshot at most 10 us with 10,000 waiting requests; reading the board is part of a
decision's 15 us with 8 engines and 60 us with 64.

Run: .venv/bin/pytest benchmarks/bench_board.py
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from gimbal.board.file import Board, board_directory, board_path
from gimbal.board.slots import BoardReader, SlotWriter
from gimbal.core.snapshot import ROW_WIDTH

ROUNDS = 20_000


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


@pytest.mark.parametrize("engines", [2, 8, 64])
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


@pytest.mark.parametrize("engines", [8, 64])
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
    from gimbal.core.snapshot import Field
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
