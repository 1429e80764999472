"""The response header that names the engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace

import pytest

pytest.importorskip("fastapi")
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from fastapi.testclient import TestClient

from gimbal.vllm_plugin.dispatch.engine_header import EngineHeader, note


def client(admin: bool) -> TestClient:
    """A server whose requests are dispatched after the response has begun, as vLLM's are."""
    app = FastAPI()
    app.add_middleware(EngineHeader)
    app.state.gimbal_operator = SimpleNamespace(config=SimpleNamespace(admin=admin))

    async def tokens(engine: int) -> AsyncIterator[str]:
        await asyncio.sleep(0)
        note(engine)
        note(engine + 1)  # a second choice (n=2) goes elsewhere
        yield "a"
        yield "b"

    @app.post("/v1/completions/{engine}")
    async def completions(engine: int) -> StreamingResponse:
        return StreamingResponse(tokens(engine))

    @app.post("/plain")
    async def plain() -> dict[str, int]:
        return {"answer": 1}

    return TestClient(app)


def test_names_the_engine_of_each_request() -> None:
    server = client(admin=True)
    for engine in (3, 0):
        response = server.post(f"/v1/completions/{engine}")
        assert (response.text, response.headers["x-gimbal-engine"]) == ("ab", str(engine))


def test_requests_that_are_not_dispatched_have_no_header() -> None:
    response = client(admin=True).post("/plain")
    assert response.json() == {"answer": 1}
    assert "x-gimbal-engine" not in response.headers


def test_off_without_admin() -> None:
    response = client(admin=False).post("/v1/completions/1")
    assert response.text == "ab"
    assert "x-gimbal-engine" not in response.headers
    note(1)  # outside of a request nobody asks
