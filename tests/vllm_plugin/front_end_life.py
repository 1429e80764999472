"""A front end over vLLM's real client class, without sockets and engines, and 500 requests."""

from __future__ import annotations

import asyncio
import copy
import inspect
import random
import weakref
from collections import Counter
from types import SimpleNamespace
from typing import Any

import faults
import numpy as np
from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequest
from vllm.v1.engine.core_client import DPLBAsyncMPClient

from gimbal.board.clock import now_us
from gimbal.board.file import Board
from gimbal.board.slots import SlotWriter
from gimbal.core.guard import LevelGuard
from gimbal.core.snapshot import ACCEPTED_REQUESTS, ACCEPTED_TOKENS, ROW_WIDTH, Field
from gimbal.vllm_plugin.dispatch import hook, unsent, user_session
from gimbal.vllm_plugin.engine.identity import server_board_path
from tests.vllm_plugin.dispatch.fakes import book_keeping, request_of

ENGINES = 3
VLLM = inspect.unwrap(DPLBAsyncMPClient.get_core_engine_for_request)
FINISH = inspect.unwrap(DPLBAsyncMPClient.process_engine_outputs)
MESSAGES = (
    {"policy": "round-robin"},
    {"levels": []},
    {"policy": "lmetric", "resets": 1},
    {"policy": "gimbal"},
)


class PlainClient(DPLBAsyncMPClient):
    """The part of vLLM's client that dispatch touches."""

    def __init__(self) -> None:
        parallel = SimpleNamespace(
            data_parallel_size=ENGINES,
            data_parallel_size_local=ENGINES,
            data_parallel_external_lb=False,
            local_engines_only=False,
        )
        self.vllm_config = SimpleNamespace(
            additional_config={"gimbal": {"levels": ["dispatch", "feedback"]}},
            parallel_config=parallel,
            model_config=SimpleNamespace(is_moe=True, served_model_name="demo"),
            kv_events_config=None,
            speculative_config=None,
        )
        book_keeping(self, ENGINES)
        self.asked: Counter[str] = Counter()  # vLLM's own method, by request

    def get_core_engine_for_request(self, request: Any) -> bytes:
        self.asked[request.request_id] += 1
        engine: bytes = VLLM(self, request)
        return engine


async def _add(self: Any, request: Any) -> None:
    self.get_core_engine_for_request(request)
    raise ConnectionError("the engine cannot be reached")


class Client(PlainClient):
    """The same with every hook of the level."""

    __init__ = hook._with_front_end(PlainClient.__init__)
    get_core_engine_for_request = hook._routed(PlainClient.get_core_engine_for_request)
    process_engine_outputs = staticmethod(hook._told(FINISH))
    add_request_async = unsent._followed(_add)


def request(name: str, number: int, session: str | None) -> EngineCoreRequest:
    """One in 20 is pinned, one in 20 a turn of a streaming session."""
    rng = random.Random(number)
    first = rng.randrange(50) * 1000
    return request_of(
        name,
        list(range(first, first + rng.choice((10, 200, 1500)))),
        data_parallel_rank=1 if number % 20 == 7 else None,
        session_id=session,
        resumable=number % 20 == 11,
    )


class Life:
    """One client's 500 requests; what came of them.

    Attributes:
        engines: what each request was told, in turn.
        front_end: the client's, None where it could not be made.
    """

    def __init__(self) -> None:
        self.client = Client()
        self.front_end = hook.front_end_of(self.client)
        self.engines: dict[str, list[bytes]] = {}
        self.session_guard = LevelGuard("dispatch")
        self._session = user_session._or_user(lambda *_: None, self.session_guard)
        with faults.by_the_test():
            self._board = Board(server_board_path(self.client.vllm_config))
            self._writers = [SlotWriter(self._board, rank) for rank in range(ENGINES)]
        self._rows = np.zeros((ENGINES, ROW_WIDTH))
        self._rows[:, Field.EPOCH] = 1

    def run(self) -> None:
        asyncio.run(self._serve())

    def wrong(self) -> str | None:
        """What is not as it must be once all requests are over."""
        client = self.client
        names = {f"r{number}" for number in range(faults.REQUESTS)}
        if set(self.engines) != names:
            return f"{len(names - set(self.engines))} requests have no engine"
        for name, told in self.engines.items():
            if client.asked[name] != len(told):
                return f"vLLM entered {name} {client.asked[name]} times, not {len(told)}"
            if len(set(told)) != 1 or told[0] not in client.core_engines:
                return f"{name} was sent to {told}"
        if client.reqs_in_flight or any(client.engine_inflight.values()):
            return f"{len(client.reqs_in_flight)} requests are still in flight"
        return self._accounts() or self._after_the_end()

    def _accounts(self) -> str | None:
        """Without faults they come back to zero."""
        if self.front_end is None:
            return None
        with faults.by_the_test():
            ledger = self.front_end.dispatcher.ledger
            self.front_end.refresh()
            for later_s in (0.0, 3.0):
                ledger.observe(self.front_end.reader.read(), now_us() + later_s * 1e6)
        left = [*ledger.inflight.ravel().tolist(), *ledger.unacked.ravel().tolist()]
        return f"accounts of an idle server: {left}" if any(left) else None

    def _after_the_end(self) -> str | None:
        """A level that switched itself off leaves what comes to vLLM's own method."""
        if self.front_end is not None and not self.front_end.guard.disabled:
            return None
        plain = PlainClient()
        plain.lb_engines = copy.deepcopy(self.client.lb_engines)
        plain.eng_start_index = self.client.eng_start_index
        for number in range(50):
            one = request(f"s{number}", number, None)
            if VLLM(plain, one) != self.client.get_core_engine_for_request(one):
                return "off, and it does not dispatch as vLLM"
        return None

    async def _serve(self) -> None:
        loop, messages, unfinished = asyncio.get_running_loop(), list(MESSAGES), []
        loop.set_exception_handler(lambda *_: None)  # as a server's, which logs and goes on
        self._publish()
        for number in range(faults.REQUESTS):
            name = f"r{number}"
            session = self._session(SimpleNamespace(user=f"u{number % 30}"), None)
            one = request(name, number, session)
            self.engines[name] = [self.client.get_core_engine_for_request(one)]
            if one.resumable:
                self.engines[name].append(self.client.get_core_engine_for_request(one))
            self._accept(self.engines[name][0], len(one.prompt_token_ids))
            unfinished.append(name)
            if number % 4 == 0:
                self._publish()
            if number % 10 == 9:
                await self._finish(unfinished[:8])
                del unfinished[:8]
            if number % 25 == 24:
                await self._cannot_send(f"never{number}", number)
                if self.front_end is not None:
                    loop.call_soon(hook._refresh, weakref.ref(self.front_end))
            if number % 100 == 50 and messages:
                with faults.by_the_test():
                    self._board.write_control(messages.pop(0))
            await asyncio.sleep(0)
        await self._finish(unfinished)
        self._publish()

    async def _cannot_send(self, name: str, number: int) -> None:
        try:
            await self.client.add_request_async(request(name, number, None))
        except ConnectionError:
            await self._finish([name])  # vLLM aborts it
        else:
            raise AssertionError("the client was to hear of it")

    async def _finish(self, names: list[str]) -> None:
        outputs = EngineCoreOutputs(finished_requests=set(names))
        await self.client.process_engine_outputs(self.client, outputs)

    def _accept(self, engine: bytes, tokens: int) -> None:
        index = self.client.core_engines.index(engine)
        self._rows[index, ACCEPTED_REQUESTS] += 1
        self._rows[index, ACCEPTED_TOKENS] += tokens

    def _publish(self) -> None:
        with faults.by_the_test():
            self._rows[:, Field.SEQUENCE] += 1
            self._rows[:, Field.TIMESTAMP_US] = now_us()
            for writer, row in zip(self._writers, self._rows, strict=True):
                writer.publish(row)
