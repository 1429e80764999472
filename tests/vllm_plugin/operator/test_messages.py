"""What is taken for a control message, and what an answer repeats of it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

pytest.importorskip("vllm")
from fastapi.testclient import TestClient

from gimbal.board.file import Board
from gimbal.core.config import parse_config
from gimbal.core.errors import InputError
from gimbal.vllm_plugin.operator.messages import MESSAGE_BYTES, NESTING, RefusedError, parsed
from gimbal.vllm_plugin.operator.routes import check_control

AS_JSON = {"Content-Type": "application/json"}
GOOD = b'{"policy": "dynamo"}'
CONFIG = parse_config({"levels": ["dispatch", "queue"], "admin": True})


@pytest.fixture
def client(site: Any) -> Iterator[TestClient]:
    made, engine, path = site({"levels": ["dispatch", "queue"], "admin": True})
    yield made
    assert Board(path).read_control() in ({}, {"policy": "dynamo"})
    assert engine.resets == 0, "nothing here asks for a reset"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (AS_JSON, 200),
        ({"Content-Type": "Application/JSON; charset=utf-8"}, 200),
        ({}, 415),
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({"Content-Type": "text/plain; application/json"}, 415),
        (AS_JSON | {"Origin": "http://testserver"}, 200),
        (AS_JSON | {"Origin": "http://testserver:80"}, 200),
        (AS_JSON | {"Origin": "http://TESTSERVER"}, 200),
        (AS_JSON | {"Origin": "https://testserver:443", "Host": "testserver"}, 200),
        (AS_JSON | {"Origin": "http://[::1]:8000", "Host": "[::1]:8000"}, 200),
        (AS_JSON | {"Origin": "http://testserver:8000"}, 403),
        (AS_JSON | {"Origin": "http://evil.example"}, 403),
        (AS_JSON | {"Origin": "http://testserver.evil.example"}, 403),
        (AS_JSON | {"Origin": "http://testserver@evil.example"}, 403),
        (AS_JSON | {"Origin": "http://[::1"}, 403),
        (AS_JSON | {"Origin": "http://testserver:x"}, 403),
        (AS_JSON | {"Origin": "null"}, 403),
        (AS_JSON | {"Origin": "null", "Host": ""}, 403),
        (AS_JSON | {"Origin": ""}, 403),
        ({"Content-Type": "text/plain", "Origin": "http://evil.example"}, 403),
    ],
)
def test_json_and_no_foreign_page(client: TestClient, headers: dict[str, str], status: int) -> None:
    answer = client.post("/gimbal/control", content=GOOD, headers=headers)
    assert answer.status_code == status
    if status != 200:
        assert list(answer.json()) == ["error"]
        assert "\n" not in answer.json()["error"]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"\xff\xfe\xfd", 400),
        (b"[" * 60_000, 400),
        (b'{"a":' * 10_000, 400),
        (b"[" * NESTING + b"]" * NESTING, 400),  # parsed, and no object
        (b"[" * (NESTING + 1) + b"]" * (NESTING + 1), 400),
        (b'{"queue": {"max_wait_s": Infinity}}', 400),
        (b'{"queue": {"max_wait_s": 1e400}}', 400),
        (b'{"queue": {"max_wait_s": -Infinity}}', 400),
        (b'{"queue": {"max_wait_s": NaN}}', 400),
        (b'{"queue": {"max_wait_s": ' + b"9" * 400 + b"}}", 400),
        (b'{"queue": {"max_wait_s": ' + b"9" * 5000 + b"}}", 400),
        (b'{"queue": {"pass_steps": ' + b"9" * 25 + b"}}", 400),
        (b'{"reset": "no"}', 400),
        (b'{"policy": "\\ud83d"}', 400),
        (b'{"\\ud83d": 1}', 400),
        (b'{"policy": "' + b"x" * 60_000 + b'"}', 400),
        (b'{"' + b"x" * 60_000 + b'": 1}', 400),
        (b'{"queue": {"' + b"x" * 60_000 + b'": 1}}', 400),
        (b'{"levels": ["' + b"x" * 60_000 + b'"]}', 400),
        (b'{"queue": [' + b"1," * 30_000 + b"1]}", 400),
        (b'{"policy_options": [' + b"1," * 30_000 + b"1]}", 400),
        (b'{"policy_options": {"session_patience": "' + b"x" * 60_000 + b'"}}', 400),
        (b" " * (MESSAGE_BYTES + 1), 413),
    ],
)
def test_one_line_whatever_the_body_and_nothing_of_its_size(
    client: TestClient, body: bytes, status: int
) -> None:
    answer = client.post("/gimbal/control", content=body, headers=AS_JSON)
    assert answer.status_code == status
    assert len(answer.content) < 500
    assert "\n" not in answer.json()["error"]
    assert client.get("/gimbal/status").status_code == 200


def posted(client: TestClient, receive: Callable[[], dict[str, Any]]) -> int:
    """Status of a control message whose events come from `receive`, as a server feeds them."""
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/gimbal/control",
        "raw_path": b"/gimbal/control",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
        "http_version": "1.1",
        "scheme": "http",
        "server": ("x", 80),
        "client": ("y", 1),
        "root_path": "",
    }
    sent: list[Any] = []

    async def next_event() -> dict[str, Any]:
        return receive()

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(client.app(scope, next_event, send))  # type: ignore[arg-type]
    return int(sent[0]["status"])


def test_a_long_body_is_not_read_to_its_end(client: TestClient) -> None:
    """Neither one that says how long it is, nor one that does not."""
    answer = client.post("/gimbal/control", content=b" " * 10_000_000, headers=AS_JSON)
    assert answer.status_code == 413
    chunks = 0

    def endless() -> dict[str, Any]:
        nonlocal chunks
        chunks += 1
        return {"type": "http.request", "body": b" " * 10_000, "more_body": True}

    assert posted(client, endless) == 413
    assert chunks <= MESSAGE_BYTES // 10_000 + 1


def test_a_client_that_goes_away_is_no_fault_of_the_server(client: TestClient) -> None:
    assert posted(client, lambda: {"type": "http.disconnect"}) == 400


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(exclude_categories=())),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)
messages = json_values | st.fixed_dictionaries(
    {},
    optional={
        "levels": json_values,
        "policy": st.sampled_from(["gimbal", "vllm", "llm-d", "dynamo"]) | json_values,
        "policy_options": st.dictionaries(
            st.sampled_from(["kv", "queue", "prefix", "session_patience"]), json_values
        )
        | json_values,
        "queue_ordering": st.sampled_from(["gimbal", "fcfs", "sjf"]) | json_values,
        "queue": st.dictionaries(
            st.sampled_from(["max_wait_s", "pass_steps", "pass_s", "options", "in_batch"]),
            json_values,
        )
        | json_values,
        "reset": json_values,
    },
)


@settings(max_examples=300)
@given(messages)
def test_any_message_is_taken_whole_or_refused_in_one_line(message: Any) -> None:
    """What is taken can be published and shown: JSON without NaN, infinity or half characters."""
    control: dict[str, Any] = {}
    said = ""
    try:
        control = check_control(parsed(json.dumps(message).encode()), CONFIG)
    except (InputError, RefusedError) as error:
        said = str(error)
    assert "\n" not in said
    json.dumps(control, allow_nan=False, ensure_ascii=False).encode()


@settings(max_examples=300)
@given(st.binary(max_size=200) | st.text('[]{}:,"0123456789eE+-.nutrlfas \\', max_size=200))
def test_any_bytes_are_json_or_refused(body: Any) -> None:
    value, status = None, 400
    try:
        value = parsed(body.encode() if isinstance(body, str) else body)
    except RefusedError as error:
        status = error.status
    assert status == 400
    json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
