"""Recording at vLLM's own client: what is recorded, when, and that nothing depends on it."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs

from gimbal.vllm_plugin.dispatch import hook, recording, unsent
from gimbal.vllm_plugin.engine import identity
from gimbal.workloads.reader import read_trace
from tests.vllm_plugin.dispatch.fakes import FINISH, ORIGINAL, book_keeping, request, served


def configured(folder: Path | None, **gimbal: Any) -> Any:
    """vLLM's configuration of a server with Gimbal that records into `folder`."""
    section = {"levels": []} | ({"trace_records": str(folder)} if folder else {}) | gimbal
    return SimpleNamespace(
        **vars(served("demo")),
        additional_config={"gimbal": section},
        cache_config=SimpleNamespace(block_size=16),
    )


class Client:
    """The part of vLLM's client that recording touches; a send may fail."""

    fails = False
    get_core_engine_for_request = ORIGINAL

    def __init__(self, vllm_config: Any) -> None:
        self.vllm_config = vllm_config
        book_keeping(self, 2)
        self.sent: list[str] = []

    @unsent._followed
    async def add_request_async(self, request: Any) -> None:
        self.get_core_engine_for_request(request)
        if self.fails:
            raise ConnectionError("the engine cannot be reached")
        self.sent.append(request.request_id)

    def add(self, name: str, **fields: Any) -> None:
        asyncio.run(self.add_request_async(request(name, 40, **fields)))  # type: ignore[call-arg]

    def answer(self, *ended: str, **tokens: int) -> None:
        outputs = [EngineCoreOutput(name, [1] * count) for name, count in tokens.items()]
        news = EngineCoreOutputs(outputs=outputs, finished_requests=set(ended) or None)
        asyncio.run(hook._told(FINISH)(self, news))


def begin(folder: Path | None, monkeypatch: Any, **gimbal: Any) -> Any:
    monkeypatch.setattr(recording, "close_at_exit", lambda *_, **__: None)
    made = hook._with_front_end(Client.__init__)
    client = Client.__new__(Client)
    made(client, configured(folder, **gimbal))
    return client


def recorder_of(client: Any) -> Any:
    return client._gimbal_recording.recorder


def test_what_vllm_serves_is_recorded_without_any_level(tmp_path: Path, monkeypatch: Any) -> None:
    client = begin(tmp_path, monkeypatch)
    client.add("a", arrival_time=100.0, session_id="s")
    client.add("b", arrival_time=101.5, cache_salt="salted")
    client.fails = True
    with pytest.raises(ConnectionError):
        client.add("never", arrival_time=102.0)
    client.fails = False
    client.answer(a=1, never=1)
    client.answer("b", "never", a=2, b=5)
    client.answer("a", a=1)
    recorder_of(client).close()
    (file,) = tmp_path.glob("trace-*-0.jsonl")
    a, b = read_trace(file).requests
    assert (a.arrival_s, a.prompt_tokens, a.output_tokens) == (0.0, 40, 4)
    assert (b.arrival_s, b.prompt_tokens, b.output_tokens) == (1.5, 40, 5)
    assert (len(a.prefix_blocks), b.prefix_blocks) == (2, ()), "a salted prompt is not another's"
    assert a.session
    assert not client.reqs_in_flight, "vLLM heard of the end too"


def test_nothing_is_recorded_unless_asked_for(monkeypatch: Any) -> None:
    client = begin(None, monkeypatch)
    client.add("a")
    client.answer("a", a=1)
    assert not hasattr(client, "_gimbal_recording")


def test_recording_that_fails_costs_no_request_and_ends(
    tmp_path: Path, monkeypatch: Any, caplog: Any
) -> None:
    client = begin(tmp_path, monkeypatch)
    recorder = recorder_of(client)

    def broken(*_: Any) -> None:
        raise RuntimeError("injected")

    for name in ("arrived", "generated", "finished"):
        monkeypatch.setattr(recorder, name, broken)
    for number in range(30):
        client.add(f"r{number}")
        client.answer(f"r{number}", **{f"r{number}": 1})
    assert client.sent == [f"r{number}" for number in range(30)]
    assert not client.reqs_in_flight
    guard = client._gimbal_recording.guard
    assert guard.disabled
    assert guard.counts == {"sent": 20, "received": 19}
    recorder.close()


def test_a_recording_that_cannot_begin_costs_no_server(
    tmp_path: Path, monkeypatch: Any, caplog: Any
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("injected")

    monkeypatch.setattr(recording, "TraceRecorder", broken)
    client = begin(tmp_path, monkeypatch)
    client.add("a")
    assert client.sent == ["a"]
    assert "requests are not recorded; serving goes on" in caplog.text


def test_one_engine_is_not_recorded_and_a_line_says_so(
    tmp_path: Path, monkeypatch: Any, caplog: Any
) -> None:
    monkeypatch.setattr(identity, "launch_board", lambda _: None)
    config = configured(tmp_path)
    config.parallel_config = SimpleNamespace(data_parallel_size=1, data_parallel_external_lb=False)
    with caplog.at_level(logging.WARNING):
        identity._prepare(config)
    assert "trace_records: no request is recorded: there is one engine only" in caplog.text
