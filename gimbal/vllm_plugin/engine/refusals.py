"""Requests that an engine answers without giving them to its scheduler.

A front end must not wait for the acknowledgement of a request that its engine refused: because it
cannot be read, because the engine is paused or about to end. vLLM has several such answers, and
each version brings more. So none of them is looked for. Counted is every request that came in and
left the number of those taken by the scheduler where it was.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from gimbal.vllm_plugin.engine.scheduler import GimbalSchedulerMixin
from gimbal.vllm_plugin.engine.signals import SchedulerSignals


def install() -> None:
    """Follows the requests of an engine process, from its sockets to its scheduler."""
    from vllm.v1.engine.core import EngineCoreProc

    EngineCoreProc.preprocess_add_request = _read(EngineCoreProc.preprocess_add_request)
    EngineCoreProc._handle_client_request = _handled(EngineCoreProc._handle_client_request)


def _read(preprocess: Any) -> Any:
    """In the thread that reads the sockets: what it cannot read never gets to the engine."""

    @wraps(preprocess)
    def preprocess_add_request(self: Any, request: Any) -> Any:
        try:
            return preprocess(self, request)
        except Exception:
            signals = _signals(self)
            if signals is not None:
                _guard(self).run("refused", _note_unread, signals, request, self.input_queue)
            raise

    return preprocess_add_request


def _handled(handle: Any) -> Any:
    """In the engine's own thread."""

    @wraps(handle)
    def handle_client_request(self: Any, request_type: Any, request: Any) -> None:
        signals = _signals(self)
        if signals is None:
            handle(self, request_type, request)
            return
        before = _guard(self).run("arrival", _taken_before, self, request_type, request, signals)
        handle(self, request_type, request)
        if before is not None:
            _guard(self).run("arrival", _note_refused, signals, request, before)

    return handle_client_request


def _signals(engine: Any) -> SchedulerSignals | None:
    """Those of the engine's scheduler; None without any, or where they failed for good."""
    scheduler = getattr(engine, "scheduler", None)
    if not isinstance(scheduler, GimbalSchedulerMixin) or scheduler._gimbal_guard.disabled:
        return None
    return scheduler.gimbal_signals


def _guard(engine: Any) -> Any:
    return engine.scheduler._gimbal_guard


def _note_unread(signals: SchedulerSignals, request: Any, input_queue: Any) -> None:
    """`request` is answered with an error by the thread that reads the sockets."""
    from vllm.utils import length_from_prompt_token_ids_or_embeds
    from vllm.v1.engine import EngineCoreRequestType

    tokens = length_from_prompt_token_ids_or_embeds(request.prompt_token_ids, request.prompt_embeds)
    signals.refused(request, tokens)
    # An idle engine waits for its input queue, and would never publish the refusal.
    input_queue.put_nowait((EngineCoreRequestType.WAKEUP, None))


def _taken_before(
    engine: Any, request_type: Any, request: Any, signals: SchedulerSignals
) -> int | None:
    """Requests taken so far, where `request` is a new one; None for any other message."""
    from vllm.v1.engine import EngineCoreRequestType

    if request_type != EngineCoreRequestType.ADD:
        return None
    # The next chunk of a streaming session: front ends count sessions once.
    return None if request[0].request_id in engine.scheduler.requests else signals.taken


def _note_refused(signals: SchedulerSignals, request: Any, before: int) -> None:
    """Counts `request` unless the scheduler has taken it."""
    if signals.taken == before:
        signals.refused(request[0], request[0].num_prompt_tokens)
