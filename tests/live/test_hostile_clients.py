"""What a client may send costs its own request at most, and leaves nothing in the accounts."""

from __future__ import annotations

import http.client
import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.live.conftest import operated

pytestmark = [pytest.mark.live, operated]
TOKENS = 8
HALF_AN_EMOJI = "\ud83d"
AS_JSON = {"Content-Type": "application/json"}


def ask(
    server: Any, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None
) -> tuple[int, bytes]:
    """Status and body of one request; a server may answer before it has read everything."""
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=120)
    try:
        connection.putrequest(method, path)
        for name, value in ((headers or {}) | {"Content-Length": str(len(body))}).items():
            connection.putheader(name, value)
        connection.endheaders()
        try:
            for start in range(0, len(body), 1 << 20):
                connection.send(body[start : start + (1 << 20)])
        except OSError:
            pass  # it has heard enough
        reply = connection.getresponse()
        return reply.status, reply.read()
    finally:
        connection.close()


def complete(server: Any, index: int, headers: dict[str, str] | None = None, **fields: Any) -> int:
    """HTTP status of a completion; every one that is 200 has all its tokens."""
    body = {"model": server.model, "prompt": f"{index} word word", "max_tokens": TOKENS}
    message = json.dumps(body | {"ignore_eos": True} | fields).encode()
    status, answer = ask(server, "POST", "/v1/completions", message, AS_JSON | (headers or {}))
    if status == 200:
        assert json.loads(answer)["usage"]["completion_tokens"] == TOKENS
    return status


def all_at_once(server: Any, count: int, **fields: Any) -> set[int]:
    with ThreadPoolExecutor(16) as pool:
        return set(pool.map(lambda index: complete(server, index, **fields), range(count)))


def control(server: Any, body: bytes, headers: dict[str, str]) -> tuple[int, bytes]:
    return ask(server, "POST", "/gimbal/control", body, headers)


def assert_nothing_is_left(server: Any) -> None:
    """The accounts are empty within seconds, and vLLM's own gauges say the same."""
    deadline = time.monotonic() + 20
    left: list[float] = [1.0]
    while any(left) and time.monotonic() < deadline:
        time.sleep(0.5)
        status, answer = ask(server, "GET", "/gimbal/status")
        assert status == 200
        left = [
            engine[f"{kind}_{what}"]
            for engine in json.loads(answer)["engines"]
            for kind in ("unacknowledged", "inflight")
            for what in ("requests", "tokens")
        ]
    assert not any(left), left


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"user": HALF_AN_EMOJI}, 200),
        ({"user": "ann " + HALF_AN_EMOJI * 1000}, 200),
        # vLLM sends these to the engine, in UTF-8: it fails without Gimbal as well.
        ({"session_id": HALF_AN_EMOJI}, 500),
        ({"vllm_xargs": {"session_id": HALF_AN_EMOJI}}, 500),
    ],
)
def test_half_an_emoji_is_served_as_vllm_serves_it(
    server: Any, fields: dict[str, Any], status: int
) -> None:
    assert all_at_once(server, 40, **fields) == {status}
    assert_nothing_is_left(server)
    assert all_at_once(server, 8) == {200}


def test_names_of_a_megabyte(server: Any) -> None:
    for field in ("user", "session_id"):
        for index in range(10):
            name = f"{index}" + "x" * (1 << 20)
            assert complete(server, index, **{field: name}) == 200
    assert_nothing_is_left(server)


def test_the_same_request_id_several_times_at_once(server: Any) -> None:
    assert all_at_once(server, 16, headers={"X-Request-Id": "same"}) == {200}
    assert all_at_once(server, 16, request_id="same") == {200}
    assert_nothing_is_left(server)


def test_refusals_leave_nothing(server: Any) -> None:
    for fields in (
        {"prompt": [10**9]},
        {"max_tokens": 10**9},
        {"n": 3, "session_id": HALF_AN_EMOJI},
        {"structured_outputs": {"json": "no schema"}},
        {"cache_salt": HALF_AN_EMOJI},
    ):
        assert all_at_once(server, 4, **fields) <= {400, 500}
    assert_nothing_is_left(server)


def test_control_takes_json_from_no_foreign_page(server: Any) -> None:
    message = b'{"policy": "vllm"}'
    before = json.loads(ask(server, "GET", "/gimbal/status")[1])["control"]  # others' messages
    answers = [
        control(server, message, {"Content-Type": "text/plain"}),
        control(server, message, AS_JSON | {"Origin": "http://evil.example"}),
        control(server, b" " * 100_000_000, AS_JSON),
        control(server, b"[" * 60_000, AS_JSON),
        control(server, b'{"queue": {"max_wait_s": Infinity}}', AS_JSON),
        control(server, b'{"queue": {"pass_steps": ' + b"9" * 25 + b"}}", AS_JSON),
        control(server, b'{"reset": "no"}', AS_JSON),
    ]
    assert [status for status, _ in answers] == [415, 403, 413, 400, 400, 400, 400]
    assert all(len(body) < 500 and list(json.loads(body)) == ["error"] for _, body in answers)
    status, answer = ask(server, "GET", "/gimbal/status")
    assert (status, json.loads(answer)["control"]) == (200, before)
    assert control(server, b"{}", AS_JSON)[0] == 200
    assert all_at_once(server, 8) == {200}
    assert_nothing_is_left(server)
