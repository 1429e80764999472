"""The HTTP side of ``gimbal stats``: one route on the API server.

Every worker of every engine is asked, and what they answer is put together and compressed: work of
a second on many ranks. It is done in a thread, since requests wait for the event loop, and once
for all who ask meanwhile.
"""

from __future__ import annotations

import asyncio
import io
import json
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple

from fastapi import Request, Response

from gimbal.core.errors import InputError
from gimbal.vllm_plugin.placement.experts import expert_load
from gimbal.vllm_plugin.placement.stats import map_in_force, to_file
from gimbal.vllm_plugin.versions import all_engines_say
from gimbal.workloads.routing import write_routing

EXPERTS_EVERY_S = 20.0
"""Pages that show experts ask again and again; a worker's answer takes a moment of its step."""
ANSWER_TIMEOUT_S = 30.0
"""A worker answers between two steps: seconds on a busy CPU server."""
JSON = "application/json"


class Answer(NamedTuple):
    """What a response is made of."""

    body: bytes
    status: int = 200
    media_type: str = JSON


class SharedAnswers:
    """Answers that take long: who asks while one is being made gets that one."""

    def __init__(self) -> None:
        self._making: dict[str, asyncio.Task[Answer]] = {}
        self.experts: Answer | None = None
        self.experts_at_s = 0.0

    async def get(self, name: str, make: Callable[[], Awaitable[Answer]]) -> Answer:
        """The answer `name`, by `make` unless it is being made; raises what `make` raises."""
        task = self._making.get(name)
        if task is None:
            task = self._making[name] = asyncio.ensure_future(_made(make))
            task.add_done_callback(lambda done: self._made(name, done))
        return await asyncio.shield(task)  # others wait for it when this one goes away

    def _made(self, name: str, done: asyncio.Task[Answer]) -> None:
        del self._making[name]
        if not done.cancelled():
            done.exception()  # those who wait have it; they may all be gone


async def _made(make: Callable[[], Awaitable[Answer]]) -> Answer:
    return await make()


async def routing_route(request: Request) -> Response:
    """``GET /gimbal/routing``: the recording as ``.npz``; asks every worker of every engine.

    With ``?map=1`` only the map in force, as JSON, which a server without the level has as well.
    """
    operator = request.app.state.gimbal_operator
    if operator is None:
        return _response(_error(404, "Gimbal is not enabled on this server"))
    core = operator.engine_client.engine_core
    only_map = bool(request.query_params.get("map"))
    method = "gimbal_experts_map" if only_map else "gimbal_routing"
    made = _map if only_map else _recording
    answer = await operator.answers.get(method, lambda: _ask(core, method, made))
    return _response(answer)


async def experts_route(request: Request) -> Response:
    """``GET /gimbal/experts``: load per layer and rank, and per layer and expert, for the live
    page. Asks every worker, at most once in `EXPERTS_EVERY_S` however many look."""
    operator = request.app.state.gimbal_operator
    if operator is None:
        return _response(_error(404, "Gimbal is not enabled on this server"))
    answers: SharedAnswers = operator.answers

    async def asked() -> Answer:
        now_s = time.monotonic()
        if answers.experts is None or now_s - answers.experts_at_s > EXPERTS_EVERY_S:
            answer = await _ask(operator.engine_client.engine_core, "gimbal_routing", _experts)
            answers.experts, answers.experts_at_s = answer, now_s
        return answers.experts

    return _response(await answers.get("experts", asked))


def _response(answer: Answer) -> Response:
    return Response(answer.body, answer.status, media_type=answer.media_type)


async def _ask(
    core: Any, method: str, made: Callable[[Sequence[dict[str, Any]]], Answer]
) -> Answer:
    """What `made` makes, in a thread, of the answers of all workers to `method`."""
    # Without a limit in the engine: vLLM would leave an answer that comes after it in the channel,
    # and take it for the output of the next step.
    asked = asyncio.ensure_future(all_engines_say(core, "collective_rpc", method, None, (), {}))
    try:
        engines = await asyncio.wait_for(asyncio.shield(asked), ANSWER_TIMEOUT_S)
    except TimeoutError:
        asked.add_done_callback(lambda late: late.cancelled() or late.exception())
        return _error(504, f"the workers did not answer within {ANSWER_TIMEOUT_S:.0f} s")
    answers = [worker for workers in engines for worker in workers]
    try:
        return await asyncio.to_thread(made, answers)
    except InputError as error:
        return _error(409, str(error))


def _map(answers: Sequence[dict[str, Any]]) -> Answer:
    return Answer(json.dumps(map_in_force(answers)).encode())


def _experts(answers: Sequence[dict[str, Any]]) -> Answer:
    return Answer(expert_load(answers))


def _recording(answers: Sequence[dict[str, Any]]) -> Answer:
    buffer = io.BytesIO()
    write_routing(buffer, to_file(answers))
    return Answer(buffer.getvalue(), media_type="application/octet-stream")


def _error(status: int, reason: str) -> Answer:
    return Answer(json.dumps({"error": reason}).encode(), status)
