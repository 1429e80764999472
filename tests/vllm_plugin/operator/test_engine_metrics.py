"""A server without a front end of Gimbal's: its engines in ``/metrics``, its load for routers."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm")
from fastapi import FastAPI
from fastapi.responses import PlainTextResponse
from fastapi.testclient import TestClient
from prometheus_client import REGISTRY, generate_latest

from gimbal.board.clock import now_us
from gimbal.board.file import Board
from gimbal.board.slots import SlotWriter
from gimbal.core.snapshot import ROW_WIDTH, Field
from gimbal.vllm_plugin.engine import identity
from gimbal.vllm_plugin.operator import routes
from tests.vllm_plugin.operator.conftest import Engine

MODEL = "behind a balancer"


@pytest.fixture
def external(tmp_path: Path, monkeypatch: Any) -> Any:
    """Rank 3 of four behind an external load balancer: routes, and what publishes its rows."""
    path = tmp_path / "gimbal-test.board"
    monkeypatch.setattr(identity, "server_board_path", lambda config: path)
    engine, app, plugin = Engine({"get_load": True}), FastAPI(), routes.GimbalEndpoints()
    engine.vllm_config.model_config = SimpleNamespace(served_model_name=MODEL)
    engine.vllm_config.parallel_config.data_parallel_size = 4
    engine.vllm_config.parallel_config.data_parallel_external_lb = True
    engine.engine_core = SimpleNamespace(engine_ranks_managed=[3], client_index=0)

    async def metrics() -> PlainTextResponse:
        return PlainTextResponse(generate_latest(REGISTRY).decode())

    plugin.attach_router(app)
    app.add_api_route("/metrics", metrics)
    asyncio.run(plugin.init_state(engine, app.state, SimpleNamespace(api_key=None)))
    board = Board(path)
    writer = SlotWriter(board, 3)

    def publish(**columns: float) -> None:
        row = np.zeros(ROW_WIDTH)
        row[[Field.SEQUENCE, Field.EPOCH, Field.TIMESTAMP_US]] = 1.0, 1.0, now_us()
        for name, value in columns.items():
            row[Field[name]] = value
        writer.publish(row)

    yield TestClient(app), publish
    board.close()


def ours(text: str) -> dict[str, float]:
    """Samples of this server: name with the rank -> value."""
    rows = [line for line in text.splitlines() if f'model_name="{MODEL}"' in line]
    found = {}
    for line in rows:
        name, _, labels = line.rpartition(" ")[0].partition("{")
        rank = labels.partition('engine="')[2].partition('"')[0]
        level = labels.partition('level="')[2].partition('"')[0]
        found[f"{name} {rank or level}".strip()] = float(line.rpartition(" ")[2])
    return found


def test_engines_and_levels_are_read_at_every_scrape(external: Any) -> None:
    client, publish = external
    for waiting in (5.0, 7.0):
        publish(WAITING_REQUESTS=waiting, STEP_TIME_US=2000.0)
        samples = ours(client.get("/metrics").text)
        assert samples["gimbal_engine_waiting_requests 3"] == waiting
        assert samples["gimbal_engine_step_time_seconds 3"] == 0.002
    assert "gimbal_engine_waiting_requests 0" not in samples, "another server's"
    states = {n.split()[1]: v for n, v in samples.items() if n.startswith("gimbal_level_state")}
    assert states == {"dispatch": 0, "queue": 1, "placement": 1, "feedback": 1}
    engines = client.get("/gimbal/status").json()["engines"]
    assert [entry["engine"] for entry in engines] == [3]


def test_a_scorer_finds_the_predicted_time_to_the_first_token(external: Any) -> None:
    client, publish = external
    name = "gimbal_engine_predicted_time_to_first_token_seconds 3"
    assert ours(client.get("/metrics").text)[name] == 0, "there before the engine has published"
    steps = {"STEP_BASE_US": 1000.0, "PREFILL_US_PER_TOKEN": 10.0, "STEP_TOKEN_BUDGET": 512.0}
    for waiting, seconds in ((0.0, 0.00612), (1024.0, 0.01836)):  # of 512 tokens, in 1 and 3 steps
        publish(**steps, WAITING_PREFILL_TOKENS=waiting)
        assert ours(client.get("/metrics").text)[name] == pytest.approx(seconds)
    # As it is asked for behind a proxy that puts something in front.
    publish(**steps, WAITING_PREFILL_TOKENS=512.0)
    client.app.root_path = "/before"
    assert ours(client.get("/before/metrics").text)[name] == pytest.approx(0.01224)


def test_a_board_that_cannot_be_read_costs_no_scrape(external: Any, monkeypatch: Any) -> None:
    client, publish = external
    publish(WAITING_REQUESTS=5.0)

    def gone(self: Any, now_s: float | None = None) -> Any:
        raise OSError("gone")

    monkeypatch.setattr("gimbal.board.slots.BoardReader.read", gone)
    assert client.get("/metrics").status_code == 200
    answer = client.get("/get_load")
    assert (answer.status_code, "error" in answer.json()) == (503, True)


def test_a_router_is_told_the_load(external: Any) -> None:
    client, publish = external
    assert client.get("/get_load").status_code == 503, "its engine has not started"
    publish(PREFILL_US_PER_TOKEN=10.0, STEP_BASE_US=1000.0, STEP_TOKEN_BUDGET=512.0)
    assert client.get("/get_load").json() == {"load": 0}
    publish(
        PREFILL_US_PER_TOKEN=10.0,
        STEP_BASE_US=1000.0,
        STEP_TOKEN_BUDGET=512.0,
        WAITING_PREFILL_TOKENS=4 * 512.0,
    )
    assert client.get("/get_load").json() == {"load": 4}


@pytest.mark.parametrize(("config", "why"), [(None, "off"), ({}, "get_load is not set")])
def test_a_server_that_is_not_to_say_it_has_no_load(site: Any, config: Any, why: str) -> None:
    client, _, _ = site(config)
    answer = client.get("/get_load")
    assert answer.status_code == 503
    assert why in answer.json()["error"]
