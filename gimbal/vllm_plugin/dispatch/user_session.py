"""OpenAI's field ``user`` as the session of requests that name none.

vLLM reads a request's session from ``session_id``, ``X-Session-ID`` or ``vllm_xargs`` and hands it
on to the client that dispatches; ``user`` it reads nowhere. vLLM itself only reports the session
in KV events.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

HTTP_SERVERS = (
    "vllm.entrypoints.launchers.api_server.entry",
    "vllm.entrypoints.openai.api_server",
)
"""Modules of vLLM's HTTP server; a process that takes requests over HTTP has loaded one."""


def install() -> None:
    """Extends vLLM's reading of a request's session; once per process."""
    from vllm.entrypoints.generate.base.serving import GenerateBaseServing

    found = GenerateBaseServing._get_session_id
    if hasattr(found, "__wrapped__"):
        return

    @wraps(found)
    def session_or_user(request: Any, raw_request: Any) -> str | None:
        session: str | None = found(request, raw_request)
        return session or getattr(request, "user", None) or None

    GenerateBaseServing._get_session_id = staticmethod(session_or_user)
