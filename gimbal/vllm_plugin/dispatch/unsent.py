"""Requests that were given an engine and never reached it leave the accounts.

vLLM chooses the engine, then encodes the request and sends it. Encoding fails for what msgpack
cannot hold, such as half an emoji in a ``session_id``; a send fails or is cancelled when the engine
or the client goes away. vLLM answers such a request with an error, as it does without Gimbal; no
engine will ever acknowledge or finish it. One that was sent is recorded where the server records.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from gimbal.vllm_plugin.dispatch import recording
from gimbal.vllm_plugin.dispatch.hook import front_end_of


def take_back(client: Any, request_id: str) -> None:
    """Tells the front end of `client` that the request was not sent."""
    front_end = front_end_of(client)
    if front_end is not None:
        front_end.guard.run("account", front_end.dispatcher.unsent, request_id)


def install() -> None:
    """Follows vLLM's sending of a request; once per process."""
    from vllm.v1.engine.core_client import DPLBAsyncMPClient

    DPLBAsyncMPClient.add_request_async = _followed(DPLBAsyncMPClient.add_request_async)


def _followed(add: Any) -> Any:
    @wraps(add)
    async def add_request_async(self: Any, request: Any) -> None:
        # A later chunk of a streaming session has no entry of its own.
        has_entry = request.request_id in self.reqs_in_flight
        try:
            await add(self, request)
        except BaseException:
            if not has_entry:
                take_back(self, request.request_id)
            raise
        if not has_entry:
            recording.sent(self, request)

    return add_request_async
