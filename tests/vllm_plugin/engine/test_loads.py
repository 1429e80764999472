"""What a KV connector loads is KV cache to come, and no prefill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gimbal.core.snapshot import Field

pytest.importorskip("vllm")
from tests.vllm_plugin import real_scheduler as real
from tests.vllm_plugin.fake_connector import loaded, prefilled_elsewhere

pytestmark = pytest.mark.slow  # importing vLLM takes most of ten seconds


@pytest.fixture
def engine(tmp_path: Path) -> Any:
    built = []

    def make(**options: Any) -> Any:
        gimbal = {"levels": ["dispatch", "queue"]}
        built.append(real.build(tmp_path, gimbal, connector="FakeConnector", **options))
        return built[-1]

    yield make
    for scheduler in built:
        scheduler.shutdown()


def signals(scheduler: Any) -> dict[str, float]:
    """Published now: prefill that waits, KV to come without and with blocks, loads, blocks."""
    scheduler.gimbal_signals.publish(0.0)
    row = scheduler.gimbal_state.row
    return {
        "prefill": row[Field.WAITING_PREFILL_TOKENS],
        "awaited": row[Field.AWAITED_KV_TOKENS],
        "loaded": row[Field.LOADED_KV_TOKENS],
        "loads": row[Field.LOADING_REQUESTS],
        "blocks": row[Field.KV_BLOCKS_USED],
        "waiting": row[Field.WAITING_REQUESTS],
    }


def expect(scheduler: Any, **figures: float) -> None:
    said = signals(scheduler)
    assert {name: said[name] for name in figures} == figures
    assert scheduler._gimbal_guard.counts == {}
    if not scheduler.connector.stored:  # what it answered is not asked again
        scheduler.gimbal_signals.needs_recount = True
        assert signals(scheduler) == said, "a recount says the same"


def step(scheduler: Any, attach: Any = lambda _result: None) -> dict[str, int]:
    output = scheduler.schedule()
    real.finish_step(scheduler, output, attach)
    return dict(output.num_scheduled_tokens)


def test_three_prompts_that_load_from_elsewhere(engine: Any) -> None:
    """KV cache to come counts once: as tokens while it has no blocks, and then as blocks."""
    scheduler = engine()
    names = ["a", "b", "c"]
    for name in names:
        scheduler.add_request(prefilled_elsewhere(real.request(name, 4000)))
    expect(scheduler, prefill=0, awaited=12_000, loaded=0, loads=3, blocks=0)
    assert step(scheduler) == {}
    expect(scheduler, prefill=0, awaited=0, loaded=12_000, loads=3, blocks=750, waiting=3)
    step(scheduler, loaded(*names))
    assert step(scheduler) == {"a": 1, "b": 1, "c": 1}, "vLLM computes the last token anew"
    expect(scheduler, prefill=0, awaited=0, loaded=0, loads=0, waiting=0)
    assert scheduler.gimbal_state.row[Field.RUNNING_TOKENS] == 12_000


def test_what_a_store_holds_is_known_once_vllm_has_asked(engine: Any) -> None:
    scheduler = engine(blocks=300)
    scheduler.connector.stored = {"part": 1600, "unknown": None, "late": 3200}
    for name in ("part", "unknown"):
        scheduler.add_request(real.request(name, 2000))
    expect(scheduler, prefill=4000, awaited=0, loads=0)
    step(scheduler)
    expect(scheduler, prefill=2400, awaited=0, loaded=1600, loads=1, blocks=100)
    # No room for it beside the other's reservation: it waits, and what it is to load is known.
    scheduler.add_request(real.request("late", 3300))
    step(scheduler)
    expect(scheduler, prefill=2400 + 100, awaited=3200, loaded=1600, loads=2, blocks=100)
    scheduler.finish_requests(["late", "part"], _aborted())
    expect(scheduler, prefill=2000, awaited=0, loaded=0, loads=0)


def test_what_is_loaded_within_the_step_is_no_prefill(engine: Any) -> None:
    scheduler = engine(blocks=300)
    scheduler.connector.between_steps = False
    scheduler.connector.stored = {"a": 1600, "b": 3200}
    scheduler.add_request(real.request("a", 1900))
    scheduler.add_request(real.request("b", 4000))
    assert step(scheduler) == {"a": 300}
    expect(scheduler, prefill=800, awaited=3200, loads=1, waiting=1)
    assert scheduler.gimbal_state.row[Field.RUNNING_TOKENS] == 1900


@pytest.mark.parametrize(("first_bad", "left"), [(0, 4000), (100, 2400)])
def test_a_load_that_fails_comes_back_as_work(engine: Any, first_bad: int, left: int) -> None:
    scheduler = engine(budget=512)
    scheduler.add_request(prefilled_elsewhere(real.request("a", 4000, output=3)))
    step(scheduler)
    (blocks,) = scheduler.kv_cache_manager.get_block_ids("a")
    output = scheduler.schedule()
    real.finish_step(scheduler, output, loaded("a", invalid_blocks=(blocks[first_bad],)))
    expect(scheduler, prefill=left, awaited=0, loaded=4000 - left, waiting=1)
    assert scheduler.gimbal_queue.view.backlog_tokens == left
    assert step(scheduler) == {"a": 512}
    expect(scheduler, prefill=0, loads=0, waiting=0)
    assert scheduler.gimbal_state.row[Field.RUNNING_PREFILL_TOKENS] == left - 512


def test_a_load_within_the_step_that_fails_comes_back_as_work(engine: Any) -> None:
    scheduler = engine(budget=512)
    scheduler.connector.between_steps = False
    scheduler.connector.stored = {"a": 1600}
    scheduler.add_request(real.request("a", 1900, output=3))
    output = scheduler.schedule()
    (blocks,) = scheduler.kv_cache_manager.get_block_ids("a")
    real.finish_step(scheduler, output, loaded(invalid_blocks=(blocks[50],)))
    expect(scheduler, prefill=0)
    assert scheduler.gimbal_state.row[Field.RUNNING_PREFILL_TOKENS] == 1100
    assert scheduler.gimbal_state.row[Field.RUNNING_TOKENS] == 800
    assert scheduler.gimbal_queue.view.decode_tokens == 0
    assert step(scheduler) == {"a": 512}
    assert scheduler.gimbal_state.row[Field.RUNNING_PREFILL_TOKENS] == 588


def _aborted() -> Any:
    from vllm.v1.request import RequestStatus

    return RequestStatus.FINISHED_ABORTED
