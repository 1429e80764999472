"""Every request that reaches an engine is acknowledged once, however the engine answers it."""

from __future__ import annotations

import queue
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gimbal.core.snapshot import ACCEPTED_REQUESTS, ACCEPTED_TOKENS

pytest.importorskip("vllm")
sys.path.insert(0, str(Path(__file__).parents[1]))
import real_scheduler
from vllm.v1.engine import EngineCoreRequestType

from gimbal.vllm_plugin.engine.refusals import _handled, _read

ADD = EngineCoreRequestType.ADD


class _Engine:
    """The part of vLLM's ``EngineCoreProc`` between sockets and scheduler."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.input_queue: queue.Queue[Any] = queue.Queue()
        self.paused = False
        self.answered: list[str] = []

    def preprocess_add_request(self, request: Any) -> Any:
        raise ValueError("cannot be read")

    def handle(self, kind: Any, message: Any) -> None:
        if kind is not ADD:
            return
        if self.paused and message[0].request_id not in self.scheduler.requests:
            self.answered.append(message[0].request_id)
        else:
            self.scheduler.add_request(message[0])


class Engine(_Engine):
    preprocess_add_request = _read(_Engine.preprocess_add_request)
    handle = _handled(_Engine.handle)

    def acknowledged(self, front_end: int = 0) -> tuple[int, int]:
        """Requests and their prompt tokens, as the next snapshot tells."""
        signals = self.scheduler.gimbal_signals
        signals.publish(0.0)
        return tuple(signals.row[[ACCEPTED_REQUESTS + front_end, ACCEPTED_TOKENS + front_end]])


@pytest.fixture
def engine(tmp_path: Path) -> Any:
    made = Engine(real_scheduler.build(tmp_path, {"levels": ["dispatch"]}))
    yield made
    made.scheduler.shutdown()


def test_what_the_scheduler_takes_is_counted_by_it_alone(engine: Any) -> None:
    engine.handle(ADD, (real_scheduler.request("a", 10), 0))
    assert engine.acknowledged() == (1, 10)


def test_what_a_paused_engine_refuses_is_counted(engine: Any) -> None:
    engine.paused = True
    for name in ("a", "b"):
        engine.handle(ADD, (real_scheduler.request(name, 10), 0))
    engine.handle(EngineCoreRequestType.ABORT, ["a"])
    assert engine.answered == ["a", "b"]
    assert engine.acknowledged() == (2, 20)


def test_chunks_of_a_session_are_not_counted_again(engine: Any) -> None:
    first, second = (real_scheduler.request("a", 10) for _ in range(2))
    first.resumable = second.resumable = True
    for message in (first, second):
        engine.handle(ADD, (message, 0))
    engine.paused = True
    engine.handle(ADD, (second, 0))
    assert engine.acknowledged() == (1, 10)


def unreadable() -> Any:
    return SimpleNamespace(client_index=1, prompt_token_ids=[1, 2, 3], prompt_embeds=None)


def test_what_cannot_be_read_is_counted_and_wakes_the_engine(engine: Any) -> None:
    """An engine of a dense model that is idle blocks on its input queue, and would stay silent."""
    with pytest.raises(ValueError, match="cannot be read"):
        engine.preprocess_add_request(unreadable())
    assert engine.input_queue.get_nowait() == (EngineCoreRequestType.WAKEUP, None)
    assert engine.acknowledged(1) == (1, 3)


def test_a_refusal_that_cannot_be_counted_changes_no_answer(
    engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("injected")

    monkeypatch.setattr(engine.scheduler.gimbal_signals, "refused", fail)
    engine.paused = True
    engine.handle(ADD, (real_scheduler.request("a", 10), 0))
    with pytest.raises(ValueError, match="cannot be read"):
        engine.preprocess_add_request(unreadable())
    assert engine.answered == ["a"]
    assert engine.scheduler._gimbal_guard.counts == {"arrival": 1, "refused": 1}


def test_an_engine_without_signals_answers_as_vllm_does() -> None:
    made = Engine(SimpleNamespace(requests={}))
    made.paused = True
    made.handle(ADD, (real_scheduler.request("a", 10), 0))
    assert made.answered == ["a"]
    del made.scheduler
    with pytest.raises(ValueError, match="cannot be read"):
        made.preprocess_add_request(unreadable())  # refused before there was a scheduler
