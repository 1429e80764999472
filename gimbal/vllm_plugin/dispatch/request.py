"""What dispatch may know of a request, read from vLLM's ``EngineCoreRequest``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from vllm.utils import length_from_prompt_token_ids_or_embeds

from gimbal.board.clock import now_us
from gimbal.core.contracts import DispatchRequest
from gimbal.vllm_plugin.engine.waiting import prefilled_elsewhere

Described = tuple[DispatchRequest, Sequence[int] | None]
"""A request, and its prompt where nothing but the tokens tells it from another; else None."""


class Plan(NamedTuple):
    """Where a request is to go.

    Attributes:
        described: the request.
        engine: its index among those managed; None where vLLM's method chooses.
        reason: why there.
        seconds: what it took a policy to choose the engine; None where none did.
    """

    described: Described
    engine: int | None
    reason: str
    seconds: float | None = None


def describe(request: Any, loads: bool = False) -> Described:
    """What dispatch may know of vLLM's ``EngineCoreRequest``.

    Args:
        loads: the engines have a KV connector.
    """
    tokens = request.prompt_token_ids
    length = length_from_prompt_token_ids_or_embeds(tokens, request.prompt_embeds)
    entry = DispatchRequest(
        request.request_id,
        length,
        now_us(),
        session_of(request),
        request.priority,
        loaded_tokens=length if loads and _prefilled_elsewhere(request) else 0,
    )
    # Prompts that differ outside their tokens must not be taken for one another.
    plain = not (request.mm_features or request.lora_request or request.cache_salt)
    return entry, tokens if plain else None


def session_of(request: Any) -> str | None:
    """``session_id``, ``X-Session-ID``, ``vllm_xargs.session_id`` or, over HTTP, ``user``."""
    if request.session_id:
        return str(request.session_id)
    extra = _extra(request)
    session = extra.get("session_id") if extra else None
    return session if isinstance(session, str) and session else None


def _prefilled_elsewhere(request: Any) -> bool:
    """As vLLM's engine will read it off the request."""
    extra = _extra(request)
    return prefilled_elsewhere(extra.get("kv_transfer_params")) if extra else False


def _extra(request: Any) -> Any:
    """``vllm_xargs`` and what vLLM puts beside them; None without."""
    sampling = request.sampling_params
    return sampling.extra_args if sampling is not None else None


def left_to_vllm(request: Any) -> str | None:
    """Why vLLM places this request whatever the policy is, or None."""
    if request.data_parallel_rank is not None:
        return "pinned"
    pooling = request.pooling_params
    if pooling is not None and pooling.late_interaction_params is not None:
        return "late_interaction"
    return None
