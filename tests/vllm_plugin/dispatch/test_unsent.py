"""Whatever fails between the decision and the engine leaves the accounts: vLLM's real client."""

from __future__ import annotations

import asyncio
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from gimbal.core.config import parse_config
from gimbal.core.snapshot import ACCEPTED_REQUESTS, ACCEPTED_TOKENS, ROW_WIDTH, Field

pytest.importorskip("vllm")
from vllm import SamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.core_client import DPLBAsyncMPClient
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from gimbal.board.clock import now_us
from gimbal.board.file import Board, board_path
from gimbal.board.slots import SlotWriter
from gimbal.vllm_plugin.dispatch import hook, unsent
from gimbal.vllm_plugin.dispatch.hook import FrontEnd, front_end_of
from tests.vllm_plugin.dispatch.fakes import book_keeping, request_of, served

HALF_AN_EMOJI = "\ud83d"
CHOOSE = DPLBAsyncMPClient.get_core_engine_for_request


class Socket:
    """Keeps what it is given for an engine; may fail, or never have room."""

    def __init__(self) -> None:
        self.sent: list[tuple[bytes, Any]] = []
        self.error: Exception | None = None
        self.full = False

    def send_multipart(self, frames: Any, copy: bool) -> asyncio.Future[None]:
        done = asyncio.get_running_loop().create_future()
        if self.error is not None:
            done.set_exception(self.error)
        elif not self.full:
            engine, _, *payload = frames
            self.sent.append((engine, MsgpackDecoder(EngineCoreRequest).decode(payload)))
            done.set_result(None)
        return done


class Client(DPLBAsyncMPClient):
    """vLLM's client with a socket of ours, and a front end that dispatches for it."""

    def __init__(self, board: Board) -> None:
        self.vllm_config = served("demo")
        book_keeping(self, 2)
        self.current_wave = 0
        self.engines_running = True
        self.encoder = MsgpackEncoder()
        self.resources: Any = SimpleNamespace(
            engine_dead=False, stats_update_task=object(), output_queue_task=object()
        )
        self.input_socket: Any = Socket()
        self._gimbal_front_end = FrontEnd(self, parse_config({"levels": ["dispatch"]}), board)
        self._gimbal_front_end._start_refresh = lambda: None  # type: ignore[method-assign]

    def get_core_engine_for_request(self, request: Any) -> Any:
        return self._gimbal_front_end.route(self, request, CHOOSE)


def request(name: str, **fields: Any) -> EngineCoreRequest:
    return request_of(name, list(range(200)), **fields)


@pytest.fixture
def client(tmp_path: Path, monkeypatch: Any) -> Client:
    before = DPLBAsyncMPClient.add_request_async
    monkeypatch.setattr(DPLBAsyncMPClient, "add_request_async", before)
    unsent.install()
    return Client(Board(board_path("server", tmp_path)))


def accounts(client: Client) -> list[float]:
    """Requests and tokens unacknowledged, then in flight, over both engines."""
    ledger = client._gimbal_front_end.dispatcher.ledger
    return [*ledger.unacked.sum(axis=1).tolist(), *ledger.inflight.sum(axis=1).tolist()]


@pytest.mark.parametrize(
    "fields",
    [
        {"session_id": HALF_AN_EMOJI},
        {"sampling_params": SamplingParams(extra_args={"session_id": HALF_AN_EMOJI})},
        {"prompt_token_ids": [1 << 70]},
        {"session_id": HALF_AN_EMOJI, "data_parallel_rank": 1},
    ],
)
def test_a_request_that_cannot_be_encoded(client: Client, fields: dict[str, Any]) -> None:
    """vLLM alone answers it with HTTP 500; so it does here, and nothing is left of it."""
    for number in range(40):
        with pytest.raises((UnicodeEncodeError, OverflowError)):
            asyncio.run(client.add_request_async(request(f"r{number}", **fields)))
    assert accounts(client) == [0.0, 0.0, 0.0, 0.0]
    front_end = client._gimbal_front_end
    front_end.dispatcher.settle()
    assert front_end.dispatcher.prefixes.match(list(range(200))).longest == 0, "nobody holds it"
    assert not front_end.dispatcher.ledger._requests
    asyncio.run(client.add_request_async(request("good")))
    assert accounts(client) == [1.0, 200.0, 1.0, 200.0]
    assert front_end.decision is not None
    assert front_end.decision.reason == "policy"


def test_a_send_that_fails_and_an_engine_that_is_dead(client: Client) -> None:
    client.input_socket.error = OSError("no route")
    with pytest.raises(OSError, match="no route"):
        asyncio.run(client.add_request_async(request("a")))
    client.resources.engine_dead = True
    with pytest.raises(EngineDeadError):
        asyncio.run(client.add_request_async(request("b")))
    assert accounts(client) == [0.0, 0.0, 0.0, 0.0]


def test_a_client_that_goes_away_before_the_socket_has_room(client: Client) -> None:
    async def leave() -> None:
        client.input_socket.full = True
        task = asyncio.create_task(client.add_request_async(request("a")))
        await asyncio.sleep(0)
        assert accounts(client) == [1.0, 200.0, 1.0, 200.0]
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(leave())
    assert accounts(client) == [0.0, 0.0, 0.0, 0.0]


def test_a_later_chunk_that_fails_does_not_end_its_session(client: Client) -> None:
    asyncio.run(client.add_request_async(request("session", resumable=True)))
    bad = request("session", resumable=True, session_id=HALF_AN_EMOJI)
    with pytest.raises(UnicodeEncodeError):
        asyncio.run(client.add_request_async(bad))
    assert accounts(client) == [1.0, 200.0, 1.0, 200.0]


def test_the_same_id_several_times_at_once(client: Client) -> None:
    """vLLM sends each; the engine takes a repeated id for a chunk and acknowledges one request."""
    for _ in range(5):
        asyncio.run(client.add_request_async(request("same")))
    assert len(client.input_socket.sent) == 5
    assert accounts(client) == [1.0, 200.0, 1.0, 200.0]
    front_end = client._gimbal_front_end
    engine = client.core_engines.index(client.reqs_in_flight["same"])
    row = np.zeros(ROW_WIDTH)
    row[[Field.EPOCH, Field.SEQUENCE, Field.TIMESTAMP_US]] = 1, 1, now_us()
    row[ACCEPTED_REQUESTS], row[ACCEPTED_TOKENS] = 1, 200
    SlotWriter(front_end.board, engine).publish(row)
    front_end.finished({"same"})
    front_end.finished({"same"})
    front_end.refresh()
    assert accounts(client) == [0.0, 0.0, 0.0, 0.0]


def test_a_decision_that_fails_half_way_is_counted_once(client: Client, monkeypatch: Any) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("injected")

    monkeypatch.setattr(client._gimbal_front_end.dispatcher, "_learn_reuse", broken)
    asyncio.run(client.add_request_async(request("a")))
    assert accounts(client) == [1.0, 200.0, 1.0, 200.0]
    assert client._gimbal_front_end.guard.counts == {"error": 1}


def test_a_fault_of_the_accounts_hides_nothing_from_the_client(
    client: Client, monkeypatch: Any
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("injected")

    front_end = client._gimbal_front_end
    monkeypatch.setattr(front_end.dispatcher, "unsent", broken)
    with pytest.raises(UnicodeEncodeError):
        asyncio.run(client.add_request_async(request("a", session_id=HALF_AN_EMOJI)))
    assert front_end.guard.counts == {"account": 1}


def test_an_end_that_failed_to_arrive_is_made_up_for(client: Client, monkeypatch: Any) -> None:
    """Nothing is in flight for vLLM any more: the next refresh finds out, and then the account."""
    asyncio.run(client.add_request_async(request("a")))
    client.reqs_in_flight.clear()
    clock = count(now_us(), 1e6)
    monkeypatch.setattr(hook, "now_us", lambda: next(clock))
    for _ in range(5):
        client._gimbal_front_end.refresh()
    assert accounts(client) == [0.0, 0.0, 0.0, 0.0]


def test_without_a_front_end_nothing_is_taken_back(client: Client, monkeypatch: Any) -> None:
    monkeypatch.setattr(client, hook._ATTRIBUTE, None)
    monkeypatch.setattr(client, "get_core_engine_for_request", lambda r: CHOOSE(client, r))
    with pytest.raises(UnicodeEncodeError):
        asyncio.run(client.add_request_async(request("a", session_id=HALF_AN_EMOJI)))
    assert front_end_of(client) is None
