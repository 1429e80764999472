"""An engine's counters against a full recount of vLLM's own scheduler after every event."""

from __future__ import annotations

import random
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from gimbal.core.snapshot import (
    ACCEPTED_REQUESTS,
    ACCEPTED_TOKENS,
    MAX_FRONT_ENDS,
    ROUTER,
    ROW_WIDTH,
    Field,
    check_row,
)

pytest.importorskip("vllm")
from gimbal.records.schema import StepRecord
from gimbal.records.store import read_records
from gimbal.vllm_plugin.engine.signals import SchedulerSignals
from gimbal.vllm_plugin.engine.state import graph_tokens
from tests.vllm_plugin import real_scheduler


class Rows:
    """A sink that keeps the newest row."""

    def __init__(self) -> None:
        self.row = np.zeros(0)
        self.count = 0

    def publish(self, row: np.ndarray, now_s: float | None = None) -> None:
        check_row(row)
        self.row, self.count = row.copy(), self.count + 1

    def __getitem__(self, field: Field) -> float:
        return float(self.row[field])


@pytest.fixture
def engine(tmp_path: Path) -> Any:
    def make(**options: Any) -> tuple[Any, Rows]:
        scheduler = real_scheduler.build(
            tmp_path, {"levels": ["dispatch"]}, **{"blocks": 2000, **options}
        )
        if scheduler.gimbal_signals is not None:
            scheduler.gimbal_signals.close()
        rows = Rows()
        scheduler.gimbal_signals = SchedulerSignals(scheduler, rows, epoch=5.0)
        return scheduler, rows

    return make


def recount(scheduler: Any) -> dict[Field, float]:
    """What the counters should say, from the scheduler's queues."""
    waiting = [*scheduler.waiting, *scheduler.kv_holding_waiting]
    prefilling = [r for r in scheduler.running if r.is_prefill_chunk]
    pool = scheduler.kv_cache_manager.block_pool
    return {
        Field.WAITING_REQUESTS: len(waiting),
        Field.RUNNING_REQUESTS: len(scheduler.running),
        Field.RUNNING_PREFILL_TOKENS: sum(r.num_tokens - r.num_computed_tokens for r in prefilling),
        Field.DECODING_REQUESTS: len(scheduler.running) - len(prefilling),
        Field.KV_BLOCKS_USED: pool.num_gpu_blocks - 1 - pool.get_num_free_blocks(),
        Field.RUNNING_TOKENS: sum(r.num_computed_tokens for r in scheduler.running),
        Field.PREEMPTIONS: sum(r.num_preemptions for r in scheduler.requests.values()),
    }


def check(scheduler: Any, rows: Rows, gone_preemptions: int = 0) -> None:
    expected = recount(scheduler)
    expected[Field.PREEMPTIONS] += gone_preemptions
    assert {field: rows[field] for field in expected} == expected


def test_the_life_of_one_request(engine: Any) -> None:
    scheduler, rows = engine(budget=512)
    request = real_scheduler.request("a", 700, output=2)
    scheduler.add_request(request)
    assert scheduler.gimbal_signals.state.waiting.get("a").uncached == 700
    first = scheduler.schedule()
    assert rows[Field.WAITING_REQUESTS] == 0
    assert rows[Field.RUNNING_PREFILL_TOKENS] == 188
    assert rows[Field.STEP_PREFILL_TOKENS] == 512
    assert rows[Field.STEP_PREFILL_DEPTH_TOKENS] == 256
    assert rows[Field.DECODING_REQUESTS] == 0
    real_scheduler.finish_step(scheduler, first)
    assert rows[Field.STEP_TIME_US] > 0
    assert rows[Field.PREFILL_TOKENS_PER_S] > 0
    real_scheduler.finish_step(scheduler, scheduler.schedule())
    assert rows[Field.RUNNING_PREFILL_TOKENS] == 0
    assert rows[Field.DECODING_REQUESTS] == 1
    assert rows[Field.RUNNING_TOKENS] == 700
    real_scheduler.finish_step(scheduler, scheduler.schedule())
    assert rows[Field.RUNNING_REQUESTS] == 0
    assert rows[Field.RUNNING_TOKENS] == 0
    assert rows[Field.KV_BLOCKS_USED] == 0
    assert rows[Field.EPOCH] == 5.0


@pytest.mark.parametrize(("active", "expected"), [(None, 64), (8, 8)])
def test_seats_are_those_that_vllm_admits_to(
    engine: Any, active: int | None, expected: int
) -> None:
    _, rows = engine(active_seats=active)
    assert rows[Field.MAX_RUNNING_REQUESTS] == expected


def test_accepted_is_counted_by_front_end_when_the_engine_takes_it(engine: Any) -> None:
    scheduler, rows = engine()
    for name, front_end, tokens in (("a", 0, 10), ("b", 2, 20), ("c", 2, 5)):
        request = real_scheduler.request(name, tokens)
        request.client_index = front_end
        scheduler.add_request(request)
    scheduler.finish_requests(["b"], _aborted())
    scheduler.gimbal_signals.refused(SimpleNamespace(client_index=1), 7)
    scheduler.schedule()
    requests = rows.row[ACCEPTED_REQUESTS : ACCEPTED_REQUESTS + 4].tolist()
    assert requests == [1, 1, 2, 0], "an abort does not take back that the request arrived"
    assert rows.row[ACCEPTED_TOKENS : ACCEPTED_TOKENS + 4].tolist() == [10, 7, 25, 0]


def test_cached_prompt_tokens_are_no_work(engine: Any) -> None:
    scheduler, rows = engine(prefix_caching=True)
    scheduler.add_request(real_scheduler.request("a", 320, output=1))
    real_scheduler.finish_step(scheduler, scheduler.schedule())
    again = real_scheduler.request("a", 320)
    again.request_id = "again"
    scheduler.add_request(again)
    assert scheduler.gimbal_signals.state.waiting.get("again").uncached == 16, (
        "one block is always computed"
    )
    scheduler.gimbal_signals.publish(0.0)
    assert rows[Field.WAITING_PREFILL_TOKENS] == 16
    assert rows[Field.PENDING_PREFIX_HIT_TOKENS] == 304


def test_an_idle_engine_says_so_once_and_then_seldom(engine: Any, monkeypatch: Any) -> None:
    scheduler, rows = engine()
    before = rows.count
    clock_us = count(1e6, 1000.0)
    monkeypatch.setattr("gimbal.vllm_plugin.engine.signals.now_us", lambda: next(clock_us))
    for _ in range(100):
        assert not scheduler.has_requests()
    assert rows.count == before + 2, "at once and 50 ms later"


def test_a_paused_engine_is_idle_and_says_at_once_who_came_and_went(engine: Any) -> None:
    from vllm.v1.core.sched.interface import PauseState

    scheduler, rows = engine()
    scheduler.has_requests()
    scheduler.set_pause_state(PauseState.PAUSED_NEW)
    for number in (1, 2):  # before vLLM waits for its next message
        scheduler.add_request(real_scheduler.request(f"r{number}", 10))
        assert not scheduler.has_requests()
        assert rows[Field.WAITING_REQUESTS] == rows.row[ACCEPTED_REQUESTS] == number
    scheduler.finish_requests(["r1"], _aborted())
    while scheduler.has_requests():  # a step in which workers hear of it
        scheduler.schedule()
    assert rows[Field.WAITING_REQUESTS] == rows[Field.IDLE] == 1.0
    scheduler.set_pause_state(PauseState.UNPAUSED)
    assert scheduler.has_requests()
    scheduler.schedule()
    assert rows[Field.IDLE] == 0.0


@pytest.mark.parametrize(
    ("named", "column"),
    [(1, 1), (15, 15), (0, 2), (16, 2), (-1, 2), (True, 2), ("3", 2), (3.0, 2), (None, 2)],
)
def test_routers_are_told_apart_where_only_they_choose(
    engine: Any, named: Any, column: int
) -> None:
    scheduler, rows = engine()
    for by_router in (False, True):
        scheduler.gimbal_signals.by_router = by_router
        request = real_scheduler.request(f"r{by_router}", 10)
        request.client_index = 2
        request.sampling_params.extra_args = {ROUTER: named}
        scheduler.add_request(request)
    scheduler.gimbal_signals.refused(request, 5)
    scheduler.schedule()
    accepted = rows.row[ACCEPTED_REQUESTS : ACCEPTED_REQUESTS + MAX_FRONT_ENDS]
    expected = np.zeros(MAX_FRONT_ENDS)
    expected[2] += 1
    expected[column] += 2
    assert accepted.tolist() == expected.tolist()


def test_an_idle_engine_says_at_once_that_it_refused_somebody(engine: Any) -> None:
    scheduler, rows = engine()
    scheduler.has_requests()
    before = rows.count
    scheduler.gimbal_signals.refused(SimpleNamespace(client_index=2), 30)
    scheduler.has_requests()
    assert rows.count == before + 1
    assert rows.row[ACCEPTED_REQUESTS + 2] == 1.0
    assert rows.row[ACCEPTED_TOKENS + 2] == 30.0


def _aborted() -> Any:
    from vllm.v1.request import RequestStatus

    return RequestStatus.FINISHED_ABORTED


@pytest.mark.parametrize(("blocks", "seed"), [(2000, 0), (2000, 1), (28, 2), (28, 3)])
def test_counters_equal_a_recount_under_random_events(engine: Any, seed: int, blocks: int) -> None:
    """Arrivals, aborts, chunked prefills, preemptions (few blocks), two steps in flight."""
    rng = random.Random(seed)
    scheduler, rows = engine(budget=128, seats=8, blocks=blocks, prefix_caching=bool(seed % 2))
    inflight: list[Any] = []
    added, accepted, preempted, seen = 0, 0, 0, {}
    for _ in range(250):
        action = rng.random()
        if action < 0.35 and len(scheduler.requests) < 20:
            tokens = rng.choice([3, 17, 60, 250] if blocks > 100 else [60, 100])
            request = real_scheduler.request(f"r{added}", tokens, output=rng.choice([1, 5, 60]))
            scheduler.add_request(request)
            seen[request.request_id] = request
            added, accepted = added + 1, accepted + tokens
        elif action < 0.42 and scheduler.requests:
            scheduler.finish_requests([rng.choice(list(scheduler.requests))], _aborted())
        elif action < 0.75 and len(inflight) < 2 and scheduler.has_requests():
            output = scheduler.schedule()
            done = [not scheduler.requests[n].is_prefill_chunk for n in output.num_scheduled_tokens]
            inflight.append((output, done))
        elif inflight:
            _finish(scheduler, *inflight.pop(0))
        scheduler.gimbal_signals.publish(0.0)
        preempted = sum(r.num_preemptions for k, r in seen.items() if k not in scheduler.requests)
        check(scheduler, rows, preempted)
        waiting = {r.request_id for r in [*scheduler.waiting, *scheduler.kv_holding_waiting]}
        tokens = sum(scheduler.gimbal_signals.state.waiting.get(name).uncached for name in waiting)
        assert rows[Field.WAITING_PREFILL_TOKENS] == tokens
        assert set(scheduler.gimbal_signals._waiting) == waiting
    assert rows.row[ACCEPTED_REQUESTS] == added
    assert rows.row[ACCEPTED_TOKENS] == accepted
    assert scheduler._gimbal_guard.counts == {}
    if blocks < 100:
        assert rows[Field.PREEMPTIONS] > 0, "the test was to preempt"


def _finish(scheduler: Any, output: Any, prompt_done: list[bool]) -> None:
    """Plays the model for a step that was scheduled when the prompts were `prompt_done`."""
    tokens = [[7] if done else [] for done in prompt_done]
    result = real_scheduler.result_of(list(output.num_scheduled_tokens), tokens)
    scheduler.update_from_output(output, result)


def test_a_missed_event_is_made_good_by_a_recount(engine: Any, monkeypatch: Any) -> None:
    scheduler, rows = engine(budget=64)
    scheduler.add_request(real_scheduler.request("a", 100))
    real_scheduler.finish_step(scheduler, scheduler.schedule())

    def enqueued(*_: Any) -> None:
        raise RuntimeError("injected")

    with monkeypatch.context() as patch:
        patch.setattr(type(scheduler.gimbal_signals), "enqueued", enqueued)
        scheduler.add_request(real_scheduler.request("b", 50))
    assert scheduler._gimbal_guard.counts == {"enqueued": 1}
    scheduler.schedule()
    check(scheduler, rows)
    assert rows[Field.SIGNAL_FALLBACKS] == 1


def test_steps_are_recorded_when_a_directory_is_configured(tmp_path: Path) -> None:
    steps = tmp_path / "steps"
    scheduler = real_scheduler.build(
        tmp_path, {"levels": ["dispatch"], "step_records": str(steps)}, budget=512
    )
    scheduler.add_request(real_scheduler.request("a", 700, output=3))
    for _ in range(4):
        real_scheduler.finish_step(scheduler, scheduler.schedule())
    scheduler.gimbal_signals.close()
    records = list(read_records(steps / "steps-0.jsonl", StepRecord))
    assert [r.prefill_tokens for r in records] == [512, 188, 0, 0]
    assert [r.decode_requests for r in records] == [0, 0, 1, 1]
    # Attention pairs n * (p + n/2) of the two chunks.
    assert [r.prefill_pairs for r in records[:2]] == [512 * 256.0, 188 * (512 + 94.0)]
    assert all(r.duration_us > 0 for r in records)


@pytest.mark.parametrize(
    ("mode", "largest", "expected"),
    [
        ("NONE", 512, 0),
        ("PIECEWISE", 512, 512),
        ("FULL", 256, 256),
        ("FULL_DECODE_ONLY", 512, 0),
        ("FULL_AND_PIECEWISE", 1024, 1024),
        ("FULL_AND_PIECEWISE", None, 0),
    ],
)
def test_the_largest_step_with_prefill_that_has_a_graph(
    mode: str, largest: int | None, expected: int
) -> None:
    from vllm.config import CUDAGraphMode

    compilation = SimpleNamespace(
        cudagraph_mode=CUDAGraphMode[mode], max_cudagraph_capture_size=largest
    )
    assert graph_tokens(SimpleNamespace(compilation_config=compilation)) == expected


def test_a_step_is_as_large_as_the_fullest_of_its_group(engine: Any) -> None:
    scheduler, _ = engine()
    assert scheduler.gimbal_state.graph_costs is None  # the CPU backend captures no graphs
    seen: list[tuple[float, ...]] = []
    signals = scheduler.gimbal_signals
    signals.state.graph_costs = SimpleNamespace(observe=lambda *figures: seen.append(figures))
    scheduler.add_request(real_scheduler.request("a", 40))
    real_scheduler.finish_step(scheduler, scheduler.schedule())
    rows = np.zeros((2, ROW_WIDTH))
    rows[:, Field.STEP_PREFILL_TOKENS] = 30.0, 90.0
    rows[:, Field.STEP_TOKENS] = 37.0, 95.0
    rows[:, Field.SEQUENCE] = 7.0, 0.0
    signals.state.group = SimpleNamespace(read=rows.copy)
    real_scheduler.finish_step(scheduler, scheduler.schedule())
    rows[:, Field.SEQUENCE] = 7.0, 1.0  # only now has everybody been heard
    real_scheduler.finish_step(scheduler, scheduler.schedule())
    assert [(figures[0], *figures[2:]) for figures in seen] == [(0, 40, 40.0), (7, 90.0, 95.0)]


def test_depth_is_learned_from_the_slowest_of_the_group(engine: Any) -> None:
    scheduler, _ = engine()
    seen: list[tuple[float, ...]] = []
    state = scheduler.gimbal_signals.state
    state.depth.observe = lambda *figures: seen.append(figures)
    scheduler.add_request(real_scheduler.request("a", 40))
    real_scheduler.finish_step(scheduler, scheduler.schedule())
    assert seen[0][:2] == (40, 40 * 20.0)
    rows = np.zeros((2, ROW_WIDTH))
    rows[:, Field.STEP_PREFILL_TOKENS] = 30.0, 90.0
    rows[:, Field.STEP_PREFILL_DEPTH_TOKENS] = 1e5, 50.0
    rows[:, Field.STEP_BASE_US] = 1e9, 0.0
    state.group = SimpleNamespace(read=rows.copy)
    state.depth._near, state.depth._far = 1.0, 100.0
    real_scheduler.finish_step(scheduler, scheduler.schedule())
    assert seen[1][:2] == (30.0, 3e6)
    assert seen[1][2] < -9e8  # the step less the longest base
    rows[:, Field.STEP_PREFILL_TOKENS] = 0.0
    real_scheduler.finish_step(scheduler, scheduler.schedule())
    assert len(seen) == 2, "a step without prefill says nothing of it"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, 1e300])
def test_what_the_worker_cannot_mean_is_left_out(
    engine: Any, caplog: pytest.LogCaptureFixture, value: float
) -> None:
    scheduler, rows = engine()
    signals = scheduler.gimbal_signals
    signals.worker_said(Field.EXPERT_PRESSURE_US, 12.0)
    for _ in range(5):
        signals.worker_said(Field.EXPERT_PRESSURE_US, value)
        signals.publish(1.0)
    assert rows[Field.EXPERT_PRESSURE_US] == 12.0
    assert signals.mended == 5
    said = [record.message for record in caplog.records if "left out" in record.message]
    assert len(said) == 1
    assert "expert_pressure_us" in said[0]


def test_a_number_that_none_can_have_costs_its_column_and_no_snapshot(engine: Any) -> None:
    """As of an ordering of somebody else's, whose bound is no number."""
    scheduler, rows = engine()
    signals = scheduler.gimbal_signals
    scheduler.add_request(real_scheduler.request("a", 40))
    signals.row[Field.QUEUE_OLDEST_BOUND_US] = float("nan")
    real_scheduler.finish_step(scheduler, scheduler.schedule())
    assert rows[Field.QUEUE_OLDEST_BOUND_US] == 0.0
    check(scheduler, rows)
    assert signals.mended == 1
    assert not signals.needs_recount
    assert scheduler._gimbal_guard.counts == {}


def test_a_count_below_zero_is_recounted(engine: Any) -> None:
    scheduler, rows = engine()
    signals = scheduler.gimbal_signals
    scheduler.add_request(real_scheduler.request("a", 40))
    output = scheduler.schedule()
    signals._running_tokens = -7
    real_scheduler.finish_step(scheduler, output)
    scheduler.add_request(real_scheduler.request("b", 50))
    real_scheduler.finish_step(scheduler, scheduler.schedule())
    check(scheduler, rows)
    assert signals.mended > 0
    assert scheduler._gimbal_guard.counts == {}


def test_rows_that_tell_nonsense_do_not_poison_what_a_step_costs(engine: Any) -> None:
    """An engine of another host in the same group, before it was refused."""
    scheduler, rows = engine(budget=512)
    bad = np.full((2, ROW_WIDTH), float("nan"))
    scheduler.gimbal_signals.state.group = SimpleNamespace(read=bad.copy)
    for number in range(5):
        scheduler.add_request(real_scheduler.request(f"a{number}", 700))
        real_scheduler.finish_step(scheduler, scheduler.schedule())
    assert scheduler.gimbal_signals.cost.steps == 0
    scheduler.gimbal_signals.state.group = None
    for number in range(20):
        scheduler.add_request(real_scheduler.request(f"b{number}", 700))
        real_scheduler.finish_step(scheduler, scheduler.schedule())
    assert scheduler.gimbal_signals.cost.steps > 10
    assert np.isfinite(rows.row).all()


def test_a_step_like_the_last_one_is_said_once_at_its_end(engine: Any) -> None:
    scheduler, rows = engine(budget=512)
    scheduler.add_request(real_scheduler.request("a", 40, output=20))
    real_scheduler.finish_step(scheduler, scheduler.schedule())
    real_scheduler.finish_step(scheduler, scheduler.schedule())  # the first without prefill
    for _ in range(3):
        before = rows.count
        output = scheduler.schedule()
        assert rows.count == before
        assert (rows[Field.STEP_PREFILL_TOKENS], rows[Field.STEP_TOKENS]) == (0, 1)
        real_scheduler.finish_step(scheduler, output)
        assert rows.count == before + 1
        check(scheduler, rows)
    scheduler.add_request(real_scheduler.request("b", 40, output=20))
    before = rows.count
    output = scheduler.schedule()
    assert rows.count > before
    assert (rows[Field.STEP_PREFILL_TOKENS], rows[Field.STEP_TOKENS]) == (40, 41)
    real_scheduler.finish_step(scheduler, output)
    before = rows.count
    scheduler.schedule()
    assert rows.count > before, "one decode more, and no prefill any more"
    assert (rows[Field.STEP_PREFILL_TOKENS], rows[Field.STEP_TOKENS]) == (0, 2)
