"""A server's routes over a fake engine client."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from fastapi.testclient import TestClient


class Engine:
    """vLLM's engine client as the routes see it; no front end dispatches."""

    def __init__(self, gimbal: dict[str, Any] | None) -> None:
        self.vllm_config = SimpleNamespace(
            additional_config={} if gimbal is None else {"gimbal": gimbal},
            instance_id="x",
            parallel_config=SimpleNamespace(
                data_parallel_size=2,
                data_parallel_size_local=2,
                local_engines_only=False,
                data_parallel_external_lb=False,
            ),
        )
        self.engine_core = object()
        self.resets = 0

    async def reset_prefix_cache(self) -> bool:
        self.resets += 1
        return True


@pytest.fixture
def site(tmp_path: Path, monkeypatch: Any) -> Any:
    """Makes a server by its configuration: a client of its routes, its engine, its board's path."""
    from fastapi import FastAPI
    from fastapi.testclient import TestClient

    from gimbal.vllm_plugin.engine import identity
    from gimbal.vllm_plugin.operator import routes

    board = tmp_path / "gimbal-test.board"
    monkeypatch.setattr(identity, "server_board_path", lambda config: board)

    def make(
        gimbal: dict[str, Any] | None, key: str | None = None
    ) -> tuple[TestClient, Engine, Path]:
        app, engine, plugin = FastAPI(), Engine(gimbal), routes.GimbalEndpoints()
        plugin.attach_router(app)
        args = SimpleNamespace(api_key=[key] if key else None)
        asyncio.run(plugin.init_state(engine, app.state, args))
        return TestClient(app), engine, board

    return make
