"""Tells a client which engine served its request: the response header ``x-gimbal-engine``.

The engine is chosen after a streaming response has begun, so the head of the response waits for
its first body chunk. That is a change of behaviour a measurement may make and a service need not:
it happens with ``admin: true`` only.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from contextvars import ContextVar
from typing import Any

HEADER = b"x-gimbal-engine"

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]

_chosen: ContextVar[list[int] | None] = ContextVar("gimbal_chosen_engines", default=None)


def note(engine: int) -> None:
    """The first request of the HTTP request at hand goes to `engine`; nobody may have asked."""
    engines = _chosen.get()
    if engines is not None and not engines:
        engines.append(engine)


class EngineHeader:
    """ASGI middleware around vLLM's application."""

    def __init__(self, app: Callable[[Message, Any, Send], Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Any, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or not _wanted(scope):
            await self.app(scope, receive, send)
            return
        engines: list[int] = []
        _chosen.set(engines)  # tasks of this request inherit the list itself
        head: list[Message] = []

        async def send_head_with_body(message: Message) -> None:
            if message["type"] == "http.response.start":
                head.append(message)
                return
            if head:
                start = head.pop()
                if engines:
                    named = (HEADER, b"%d" % engines[0])
                    start["headers"] = [*start.get("headers", ()), named]
                await send(start)
            await send(message)

        await self.app(scope, receive, send_head_with_body)


def _wanted(scope: Message) -> bool:
    operator = getattr(scope["app"].state, "gimbal_operator", None)
    return operator is not None and bool(operator.config.admin)
