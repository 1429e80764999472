"""What an operator may switch on a running server, and what the server answers."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from gimbal.core.config import parse_config
from gimbal.core.errors import InputError
from gimbal.core.snapshot import ROW_WIDTH

pytest.importorskip("vllm")
from fastapi import FastAPI
from fastapi.testclient import TestClient

from gimbal.board.file import Board
from gimbal.board.slots import SlotWriter
from gimbal.vllm_plugin.engine import identity
from gimbal.vllm_plugin.operator import routes as control
from gimbal.vllm_plugin.operator.routes import GimbalEndpoints, check_control
from gimbal.vllm_plugin.placement import route

CONFIG = parse_config({"levels": ["dispatch", "queue", "placement"]})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "a JSON object is expected"),
        ({"polcy": "x"}, "unknown key 'polcy' (did you mean 'policy'?)"),
        ({"policy": "gimball"}, "policy: unknown 'gimball' (did you mean 'gimbal'?)"),
        ({"policy": 3}, "policy: unknown 3"),
        ({"queue_ordering": "fcf"}, "did you mean 'fcfs'?"),
        ({"queue": 3}, "queue: a mapping is expected"),
        ({"queue": {"max_wait": 3}}, "did you mean 'max_wait_s'?"),
        ({"queue": {"tpot_factor": "x"}}, "queue.tpot_factor"),
        ({"queue": {"priority_tokens": 3}}, "priority_tokens cannot be changed"),
        ({"levels": "queue"}, "a list is expected"),
        ({"levels": ["que", "placement"]}, "unknown 'que'"),
        ({"levels": ["feedback", "placement"]}, "started without 'feedback'"),
        ({"levels": ["dispatch"]}, "'placement' cannot be switched off"),
    ],
)
def test_bad_control_messages_are_refused(values: Any, message: str) -> None:
    with pytest.raises(InputError) as error:
        check_control(values, CONFIG)
    assert message in str(error.value)


def test_what_reaches_the_board() -> None:
    values = {"levels": ["placement", "dispatch"], "policy": "vllm", "queue_ordering": "sjf"}
    expected = {"levels": ["dispatch", "placement"], "policy": "vllm", "ordering": "sjf"}
    assert check_control(values, CONFIG) == expected
    assert check_control({"reset": True}, CONFIG) == {}
    assert check_control({"queue": {"max_wait_s": 5}}, CONFIG) == {"queue": {"max_wait_s": 5.0}}


class Engine:
    """vLLM's engine client as the routes see it; no front end dispatches."""

    def __init__(self, gimbal: dict[str, Any] | None) -> None:
        self.vllm_config = SimpleNamespace(
            additional_config={} if gimbal is None else {"gimbal": gimbal},
            instance_id="x",
            parallel_config=SimpleNamespace(data_parallel_size=2),
        )
        self.engine_core = object()
        self.resets = 0

    async def reset_prefix_cache(self) -> bool:
        self.resets += 1
        return True


@pytest.fixture
def site(tmp_path: Path, monkeypatch: Any) -> Any:
    board = tmp_path / "gimbal-test.board"
    monkeypatch.setattr(control, "server_board_path", lambda config: board)

    def make(
        gimbal: dict[str, Any] | None, key: str | None = None
    ) -> tuple[TestClient, Engine, Path]:
        app, engine, plugin = FastAPI(), Engine(gimbal), GimbalEndpoints()
        plugin.attach_router(app)
        args = SimpleNamespace(api_key=[key] if key else None)
        asyncio.run(plugin.init_state(engine, app.state, args))
        return TestClient(app), engine, board

    return make


def test_status_names_every_field_of_every_engine(site: Any) -> None:
    client, _, path = site({"levels": ["queue"]})
    row = np.zeros(ROW_WIDTH)
    row[[0, 3]] = 7.0, 2.0
    SlotWriter(Board(path), 1).publish(row)
    found = client.get("/gimbal/status").json()
    assert [engine["engine"] for engine in found["engines"]] == [0, 1]
    assert found["engines"][1]["waiting_requests"] == 2.0
    assert found["engines"][0]["age_us"] is None
    assert found["engines"][1]["age_us"] > 0
    assert found["config"]["levels"] == ["queue"]
    assert found["dispatch"] is None


def test_the_page_loads_nothing_and_reads_only_what_status_says(site: Any) -> None:
    client, _, _ = site({"levels": ["queue"]})
    answer = client.get("/gimbal")
    assert answer.headers["content-type"].startswith("text/html")
    assert not re.search(r"https?://|<link|\bsrc=|@import", answer.text)
    status = client.get("/gimbal/status").json()
    read = set(re.findall(r"\bengine\.(\w+)|\bsum\(\"(\w+)\"\)", answer.text))
    fields = {field for pair in read for field in pair if field}
    assert len(fields) > 15
    # Only a front end that dispatches has accounts.
    assert fields - {"unacknowledged_requests"} <= set(status["engines"][0])
    assert set(re.findall(r"\bstatus\.(\w+)", answer.text)) <= set(status)


def test_control_needs_admin(site: Any) -> None:
    client, _, path = site({"levels": ["dispatch"]})
    assert client.post("/gimbal/control", json={"policy": "vllm"}).status_code == 403
    assert Board(path).control_version() == 0


def test_control_needs_the_servers_key(site: Any) -> None:
    client, _, path = site({"levels": ["dispatch"], "admin": True}, key="secret")
    for header in ({}, {"Authorization": "Bearer guess"}):
        answer = client.post("/gimbal/control", json={"policy": "vllm"}, headers=header)
        assert answer.status_code == 401
    assert Board(path).control_version() == 0
    header = {"Authorization": "Bearer secret"}
    answer = client.post("/gimbal/control", json={"policy": "vllm"}, headers=header)
    assert answer.status_code == 200
    assert client.get("/gimbal/status").status_code == 200


def test_routing_that_takes_too_long_is_no_ones_harm(site: Any, monkeypatch: Any) -> None:
    client, engine, _ = site({"levels": ["dispatch"]})
    asked = []

    async def never(*args: Any) -> Any:
        asked.append(args)
        await asyncio.sleep(3600)

    engine.engine_core = SimpleNamespace(call_utility_all_async=never)
    monkeypatch.setattr(route, "ANSWER_TIMEOUT_S", 0.05)
    answer = client.get("/gimbal/routing")
    assert answer.status_code == 504
    assert "did not answer" in answer.json()["error"]
    # A limit in the engine would leave the late answer where the next step's output is awaited.
    assert asked == [("collective_rpc", "gimbal_routing", None, (), {})]


def test_control_merges_and_resets(site: Any) -> None:
    client, engine, path = site({"levels": ["dispatch", "queue"], "admin": True})
    assert client.post("/gimbal/control", json={"policy": "dynamo"}).status_code == 200
    client.post("/gimbal/control", json={"levels": ["queue"], "reset": True})
    assert Board(path).read_control() == {"levels": ["queue"], "policy": "dynamo", "resets": 1}
    assert engine.resets == 1
    answer = client.post("/gimbal/control", content=b"{")
    assert (answer.status_code, list(answer.json())) == (400, ["error"])
    answer = client.post("/gimbal/control", json={"policy": "none"})
    assert answer.status_code == 400
    assert json.loads(answer.content)["error"].startswith("control: policy")


def test_a_server_without_gimbal_says_so(site: Any) -> None:
    client, _, path = site(None)
    assert client.get("/gimbal/status").json()["config"] is None
    assert client.post("/gimbal/control", json={}).status_code == 403
    assert not path.exists()


def test_two_launches_have_two_boards(monkeypatch: Any) -> None:
    config = SimpleNamespace(instance_id="abc")
    monkeypatch.delenv(identity.RUN_ID, raising=False)
    paths = []
    for _ in range(2):
        identity.launch_board(config)
        path = identity.server_board_path(config)
        paths.append(path)
        assert path.exists()
        Board(path).close()
        assert not path.exists()
    assert len(set(paths)) == 2
    monkeypatch.delenv(identity.RUN_ID)


def test_ray_engines_find_the_board_by_instance(monkeypatch: Any) -> None:
    monkeypatch.delenv(identity.RUN_ID, raising=False)
    front_end, engine = SimpleNamespace(instance_id="abc"), SimpleNamespace(instance_id="abc_dp3")
    assert identity.server_board_path(front_end) == identity.server_board_path(engine)
