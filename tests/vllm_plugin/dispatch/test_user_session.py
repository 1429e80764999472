"""The session of a request at vLLM's HTTP layer."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")
from vllm.entrypoints.generate.base.serving import GenerateBaseServing
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.v1.serial_utils import MsgpackEncoder

from gimbal.vllm_plugin.dispatch import user_session


@pytest.fixture(autouse=True)
def installed() -> Iterator[None]:
    original = GenerateBaseServing.__dict__["_get_session_id"]
    user_session.install()
    user_session.install()
    yield
    GenerateBaseServing._get_session_id = original


@pytest.mark.parametrize(
    ("fields", "headers", "expected"),
    [
        ({}, {}, None),
        ({"user": ""}, {}, None),
        ({"user": "ann"}, {}, "ann"),
        ({"user": "ann", "session_id": "s"}, {}, "s"),
        ({"user": "ann"}, {"X-Session-ID": "h"}, "h"),
        ({"user": "ann", "vllm_xargs": {"session_id": "x"}}, {}, "x"),
    ],
)
def test_user_counts_where_no_session_is_named(
    fields: dict[str, Any], headers: dict[str, str], expected: str | None
) -> None:
    request = CompletionRequest(model="m", prompt="p", **fields)
    raw = SimpleNamespace(headers=headers)
    assert GenerateBaseServing._get_session_id(request, raw) == expected


@pytest.mark.parametrize("user", ["\ud83d", "ann \udcff", "x" * 1_000_000, "\ud83d" * 1000])
def test_a_user_that_cannot_travel_goes_by_its_digest(user: str) -> None:
    """vLLM reads `user` nowhere, so nothing it holds may fail a request."""
    session = user_session.session_of_user(user)
    assert session is not None
    assert len(session) == 32
    assert session == user_session.session_of_user(user) != user_session.session_of_user(user + "x")
    MsgpackEncoder().encode([session])


@pytest.mark.parametrize("user", [None, "", 7])
def test_no_user_no_session(user: Any) -> None:
    assert user_session.session_of_user(user) is None
