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

from gimbal.core.contracts import ROW_WIDTH
from gimbal.vllm_plugin.board import Board, board_directory, board_path
from gimbal.vllm_plugin.board_slots import BoardReader, SlotWriter

ROUNDS = 20_000


@pytest.fixture
def board() -> Iterator[Board]:
    folder = Path(tempfile.mkdtemp(prefix="gimbal-bench-", dir=board_directory()))
    yield Board(board_path("bench", folder))
    shutil.rmtree(folder)


def waiting_scheduler(waiting: int) -> Any:
    """What `SchedulerSignals` reads of a scheduler with `waiting` requests and 64 running."""
    pool = SimpleNamespace(num_gpu_blocks=10_001, get_num_free_blocks=lambda: 5_000)
    return SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_batched_tokens=8192, max_num_seqs=1024),
        kv_cache_manager=SimpleNamespace(
            block_pool=pool, get_computed_blocks=lambda request: (None, 0, 0)
        ),
        block_size=16,
        num_spec_tokens=0,
        enable_kv_cache_events=False,
        requests={},
        running=[],
        waiting=list(range(waiting)),
        kv_holding_waiting=[],
        get_request_counts=lambda: (64, waiting),
    )


@pytest.mark.parametrize("waiting", [0, 10_000])
def test_snapshot(benchmark: Any, board: Board, waiting: int) -> None:
    """One `SchedulerSignals.publish` into shared memory."""
    from gimbal.vllm_plugin.clock import now_us
    from gimbal.vllm_plugin.signals import SchedulerSignals

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
