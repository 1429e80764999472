"""OpenAI's field ``user`` as the session of requests that name none.

vLLM reads a request's session from ``session_id``, ``X-Session-ID`` or ``vllm_xargs`` and hands it
on to the client that dispatches; ``user`` it reads nowhere. vLLM itself only reports the session
in KV events.

What vLLM ignores must never fail a request, and a session travels to the engine as UTF-8: a user
name that UTF-8 cannot hold (half an emoji), or a long one, goes there as its digest.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from gimbal.core.dispatch.names import LONGEST, digest
from gimbal.core.files import is_unicode
from gimbal.core.guard import LevelGuard
from gimbal.vllm_plugin.dispatch.metrics import dispatch_metrics

HTTP_SERVERS = (
    "vllm.entrypoints.launchers.api_server.entry",
    "vllm.entrypoints.openai.api_server",
)
"""Modules of vLLM's HTTP server; a process that takes requests over HTTP has loaded one."""


def install() -> None:
    """Extends vLLM's reading of a request's session; once per process."""
    from vllm.entrypoints.generate.base.serving import GenerateBaseServing

    found = GenerateBaseServing._get_session_id
    if not hasattr(found, "__wrapped__"):
        guard = LevelGuard("dispatch", on_fallback=dispatch_metrics().fell_back)
        GenerateBaseServing._get_session_id = staticmethod(_or_user(found, guard))


def _or_user(found: Any, guard: LevelGuard) -> Any:
    @wraps(found)
    def session_or_user(request: Any, raw_request: Any) -> str | None:
        session: str | None = found(request, raw_request)
        if session or guard.disabled:
            return session
        return guard.run("session", session_of_user, getattr(request, "user", None))

    return session_or_user


def session_of_user(user: Any) -> str | None:
    """The session of OpenAI's `user`: the name itself or, where that would not do, its digest."""
    if not isinstance(user, str) or not user:
        return None
    if len(user) <= LONGEST and is_unicode(user):
        return user
    return digest(user).hex()
