"""What an operator may switch on a running server, and what the server answers."""

from __future__ import annotations

import asyncio
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from gimbal.core.config import parse_config
from gimbal.core.errors import InputError
from gimbal.core.snapshot import ROW_WIDTH, Field

pytest.importorskip("vllm")
from gimbal.board.file import Board
from gimbal.board.layout import EVERY_CONTROL
from gimbal.board.slots import SlotWriter
from gimbal.report.live_status import read_status
from gimbal.vllm_plugin.engine import identity
from gimbal.vllm_plugin.operator import routes
from gimbal.vllm_plugin.operator.routes import check_control
from gimbal.vllm_plugin.placement import route

CONFIG = parse_config({"levels": ["dispatch", "queue", "placement"]})
AS_JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "a JSON object is expected"),
        ({"polcy": "x"}, "unknown key 'polcy' (did you mean 'policy'?)"),
        ({"policy": "gimball"}, "policy: unknown 'gimball' (did you mean 'gimbal'?)"),
        ({"policy": 3}, "policy: expected a name, got 3"),
        ({"policy": "nowhere.x:Y"}, "policy: dispatch policy 'nowhere.x:Y' cannot be imported"),
        ({"policy": "json:JSONDecoder"}, "has no method costs"),
        ({"policy": "llm-d", "policy_options": {"prefx": 1}}, "(did you mean 'prefix'?)"),
        ({"policy": "llm-d", "policy_options": {"kv": "x"}}, "control: policy_options.kv: "),
        ({"policy": "lmetric", "policy_options": {"kv": 1}}, "('lmetric' has no options)"),
        ({"policy_options": {"session_patienc": 1}}, "(did you mean 'session_patience'?)"),
        ({"policy_options": 3}, "policy_options: a mapping is expected, got 3"),
        ({"queue_ordering": "fcf"}, "did you mean 'fcfs'?"),
        ({"queue_ordering": []}, "queue_ordering: expected a name, got []"),
        ({"queue_ordering": "nowhere.x:Y"}, "queue_ordering: queue ordering 'nowhere.x:Y' cannot"),
        (
            {"queue": {"options": {"overtak": 3}}},
            "queue.options: unknown option 'overtak' (did you",
        ),
        (
            {"queue_ordering": "sjf", "queue": {"options": {"overtake_factor": 3}}},
            "control: queue.options: unknown option 'overtake_factor' ('sjf' has no options)",
        ),
        ({"queue": {"options": 3}}, "queue.options: a mapping is expected"),
        ({"queue": 3}, "queue: a mapping is expected"),
        ({"queue": {"max_wait": 3}}, "did you mean 'max_wait_s'?"),
        ({"queue": {"slo_tpot_ms": "x"}}, "queue.slo_tpot_ms"),
        ({"queue": {"priority_tokens": 3}}, "priority_tokens cannot be changed"),
        ({"levels": "queue"}, "a list is expected"),
        ({"levels": ["que", "placement"]}, "unknown 'que'"),
        ({"levels": ["feedback", "placement"]}, "started without 'feedback'"),
        ({"levels": ["dispatch"]}, "'placement' cannot be switched off"),
        ({"reset": "no"}, "control: reset: true or false is expected, got 'no'"),
        ({"reset": 1}, "control: reset: true or false is expected, got 1"),
        ({"reset": None}, "control: reset: true or false is expected, got None"),
        ({"queue": {"pass_steps": 10**24}}, "queue.pass_steps"),
        ({"queue": {"max_wait_s": float("inf")}}, "queue.max_wait_s"),
    ],
)
def test_bad_control_messages_are_refused(values: Any, message: str) -> None:
    with pytest.raises(InputError) as error:
        check_control(values, CONFIG)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_what_reaches_the_board() -> None:
    values = {"levels": ["placement", "dispatch"], "policy": "vllm", "queue_ordering": "sjf"}
    expected = {"levels": ["dispatch", "placement"], "policy": "vllm", "ordering": "sjf"}
    assert check_control(values, CONFIG) == expected
    assert check_control({"reset": True}, CONFIG) == {}
    assert check_control({"queue": {"max_wait_s": 5}}, CONFIG) == {"queue": {"max_wait_s": 5.0}}


def test_options_go_with_the_policy_they_were_given_with() -> None:
    def after(*messages: dict[str, Any]) -> dict[str, Any]:
        control: dict[str, Any] = {}
        for values in messages:
            control = check_control(values, CONFIG, control)
        return control

    weighed = {"policy": "llm-d", "policy_options": {"kv": 3}}
    assert after(weighed) == weighed
    assert after(weighed, {"reset": True}) == weighed
    assert after(weighed, {"policy_options": {"kv": 1}})["policy_options"] == {"kv": 1}
    assert after(weighed, {"policy": "lmetric"}) == {"policy": "lmetric"}
    assert after(weighed, {"policy": "llm-d"}) == {"policy": "llm-d"}
    own = {"policy_options": {"session_patience": 2}}
    assert after(own) == own

    factor = {"queue": {"max_wait_s": 5.0, "options": {"overtake_factor": 3}}}
    assert after(factor) == factor
    assert after(factor, {"queue_ordering": "gimbal"})["queue"] == factor["queue"]
    switched = {"ordering": "sjf", "queue": {"max_wait_s": 5.0}}
    assert after(factor, {"queue_ordering": "sjf"}) == switched
    assert after(factor, {"queue": {}}) == {"queue": {}}
    # The flat key of before 0.2 is the ordering's own option now.
    flat = after({"queue": {"overtake_factor": 3}})
    assert flat == {"queue": {"options": {"overtake_factor": 3}}}


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
    assert found["policies"] == {"dispatch": None, "ordering": "gimbal", "placer": None}
    shown = read_status(found)
    assert shown.policies == {"ordering": "gimbal"}
    assert shown.engines[1]["waiting_requests"] == 2.0
    assert shown.trouble[0] == "engine 0 has published nothing yet"


FOREIGN = """
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Options:
    weight: float = 1.0
    note: str = ""


class Policy:
    Options = Options

    def __init__(self, options):
        pass

    def costs(self, request, loads):
        return np.zeros(len(loads.board))


class Ordering:
    Options = Options

    def __init__(self, options):
        pass

    def key(self, request, state):
        return 0.0


class Exits:
    def __init__(self):
        raise SystemExit(1)

    costs = key = None.__init__
"""


@pytest.fixture
def foreign(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "foreign_control.py").write_text(FOREIGN)
    (tmp_path / "foreign_exit.py").write_text("raise SystemExit(1)")
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.usefixtures("foreign")
def test_status_names_what_an_operator_put_in_force(site: Any) -> None:
    levels = ["queue", "placement"]
    client, _, _ = site({"levels": levels, "admin": True, "placement": {"placer": "swift"}})
    message = {"queue_ordering": "foreign_control:Ordering", "queue": {"options": {"weight": 2}}}
    assert client.post("/gimbal/control", json=message).status_code == 200
    named = {"dispatch": None, "ordering": "foreign_control:Ordering", "placer": "swift"}
    assert client.get("/gimbal/status").json()["policies"] == named
    client.post("/gimbal/control", json={"levels": ["placement"]})
    assert client.get("/gimbal/status").json()["policies"]["ordering"] is None


@pytest.mark.usefixtures("foreign")
def test_a_foreign_policy_that_is_no_good_is_a_bad_request(site: Any) -> None:
    client, engine, path = site({"levels": ["dispatch", "queue"], "admin": True})
    for name in ("foreign_exit:X", "foreign_control:Absent", "foreign_control:Exits"):
        for key in ("policy", "queue_ordering"):
            answer = client.post("/gimbal/control", json={key: name, "reset": True})
            assert answer.status_code == 400
            assert answer.json()["error"].startswith(f"control: {key}: ")
    good = {"policy": "foreign_control:Policy"}
    for options, word in (({"wait": 1}, "did you mean 'weight'"), ({"note": "x" * 4096}, "bytes")):
        message = good | {"policy_options": options, "reset": True}
        answer = client.post("/gimbal/control", json=message)
        assert answer.status_code == 400
        assert word in answer.json()["error"]
    for bad in ('{"policy_options": NaN}', json.dumps(good | {"policy_options": {"weight": 1}})):
        bad = bad.replace("1", "1e400")
        assert client.post("/gimbal/control", content=bad, headers=AS_JSON).status_code == 400
    assert engine.resets == 0
    assert Board(path).control_version() == 0
    assert client.post("/gimbal/control", json=good).json() == good


def test_the_page_loads_nothing_and_draws_only_what_it_is_told(site: Any) -> None:
    client, _, _ = site({"levels": ["queue"]})
    answer = client.get("/gimbal")
    assert answer.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert not re.search(r"https?://|<link|\bsrc=|@import|/\* (style|script) \*/", answer.text)
    told = client.get("/gimbal/view").json()
    columns = {*told["columns"], "style"}
    read = set(re.findall(r"\b(?:e|one|engine)\.([a-z_]+)\b(?!\()", answer.text))
    assert len(read) > 15
    assert read <= columns
    assert set(re.findall(r"\bview\.(\w+)", answer.text)) <= set(told)


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
    answer = client.post("/gimbal/control", content=b"{", headers=AS_JSON)
    assert (answer.status_code, list(answer.json())) == (400, ["error"])
    answer = client.post("/gimbal/control", json={"policy": "none"})
    assert answer.status_code == 400
    assert json.loads(answer.content)["error"].startswith("control: policy")


def test_the_answer_says_which_engines_of_other_hosts_follow(site: Any, monkeypatch: Any) -> None:
    client, engine, path = site({"levels": ["queue"], "admin": True})
    engine.vllm_config.parallel_config.data_parallel_size_local = 1
    monkeypatch.setattr(routes, "FOLLOW_S", 0.05)
    board = Board(path)
    board.hold(0, EVERY_CONTROL)
    answer = client.post("/gimbal/control", json={"queue_ordering": "sjf"})
    assert answer.json() == {"ordering": "sjf", "followed": [0], "not_followed": [1]}
    assert board.read_control() == {"ordering": "sjf"}

    slept = asyncio.sleep

    async def hold(seconds: float) -> None:
        board.hold(1, board.control_version())
        await slept(0)

    monkeypatch.setattr(routes, "FOLLOW_S", 60.0)
    monkeypatch.setattr(asyncio, "sleep", hold)
    answer = client.post("/gimbal/control", json={"queue_ordering": "fcfs"})
    assert answer.json() == {"ordering": "fcfs", "followed": [0, 1], "not_followed": []}


def test_a_server_without_gimbal_says_so(site: Any) -> None:
    client, _, path = site(None)
    assert client.get("/gimbal/status").json()["config"] is None
    assert client.post("/gimbal/control", json={}).status_code == 403
    assert not path.exists()


def test_a_switch_off_sent_while_a_reset_is_in_flight_stays(site: Any, monkeypatch: Any) -> None:
    """Another front end publishes while this one waits for the caches."""
    client, engine, path = site({"levels": ["dispatch", "queue"], "admin": True})

    async def reset_prefix_cache() -> bool:
        Board(path).update_control(lambda before: before | {"levels": [], "resets": 7})
        return True

    monkeypatch.setattr(engine, "reset_prefix_cache", reset_prefix_cache)
    answer = client.post("/gimbal/control", json={"policy": "dynamo", "reset": True})
    expected = {"levels": [], "policy": "dynamo", "resets": 8}
    assert answer.json() == expected
    assert Board(path).read_control() == expected


def test_a_board_that_fails_is_one_line_and_no_fault_of_the_client(
    site: Any, monkeypatch: Any
) -> None:
    client, _, _ = site({"levels": ["dispatch"], "admin": True})

    def broken(*_: Any) -> None:
        raise OSError("no space left\non device")

    monkeypatch.setattr(Board, "update_control", broken)
    monkeypatch.setattr(Board, "read_control", lambda self: {})
    answer = client.post("/gimbal/control", json={"policy": "vllm"})
    assert answer.status_code == 503
    assert answer.json()["error"].endswith("no space left on device")
    monkeypatch.setattr(Board, "read_control", broken)
    answer = client.get("/gimbal/status")
    assert answer.status_code == 503
    assert answer.json()["error"].endswith("no space left on device")


def test_status_survives_numbers_that_are_none(site: Any, monkeypatch: Any) -> None:
    client, _, _ = site({"levels": ["queue"]})
    rows = np.zeros((2, ROW_WIDTH))
    rows[1, Field.WAITING_REQUESTS] = np.nan
    rows[1, Field.STEP_TIME_US] = np.inf
    operator = client.app.state.gimbal_operator
    monkeypatch.setattr(operator.reader, "read", lambda: rows)
    answer = client.get("/gimbal/status")
    assert answer.status_code == 200
    engine = answer.json()["engines"][1]
    assert (engine["waiting_requests"], engine["step_time_us"]) == (None, None)
    assert engine["running_requests"] == 0.0


def launched(**parallel: Any) -> Any:
    """The ``VllmConfig`` of a server that starts."""
    internal = {"data_parallel_external_lb": False}
    return SimpleNamespace(
        instance_id="abc", parallel_config=SimpleNamespace(**internal | parallel)
    )


def test_two_launches_have_two_boards(monkeypatch: Any) -> None:
    config = launched()
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


def test_ranks_that_are_servers_of_their_own_share_a_board(monkeypatch: Any) -> None:
    """As long as one of them is there, and with no other group of the host."""
    boards: list[Board] = []
    monkeypatch.setenv(identity.RUN_ID, "")
    monkeypatch.setattr(identity, "close_at_exit", boards.append)
    group = {"data_parallel_external_lb": True, "data_parallel_master_ip": "127.0.0.1"}
    ports = (29550, 29550, 29551)
    for config in (*(launched(**group, data_parallel_rpc_port=p) for p in ports), launched()):
        identity.launch_board(config)
    first, second, elsewhere, alone = (board.path for board in boards)
    assert first == second
    assert len({first, elsewhere, alone}) == 3
    assert boards[0].write_control({"levels": []}) == 1
    boards[0].close()
    assert first.exists(), "of the one that is still there"
    assert boards[1].read_control() == {"levels": []}
    for board in boards[1:]:
        board.close()
    assert not any(board.path.exists() for board in boards)


def test_rays_actors_are_given_the_name_of_the_board(monkeypatch: Any) -> None:
    from vllm.ray.ray_env import get_env_vars_to_copy

    config = launched()
    monkeypatch.setenv(identity.RUN_ID, "")
    monkeypatch.setenv(identity.RAY_COPIES, "MINE, OURS")
    for _ in range(2):
        identity.launch_board(config)
        path = identity.server_board_path(config)
        Board(path).close()
    copied = get_env_vars_to_copy(destination="an engine")
    assert {"MINE", "OURS", identity.RUN_ID} <= copied
    assert os.environ[identity.RAY_COPIES].count(identity.RUN_ID) == 1
    # What another front end of this server, or an actor with these variables, makes of it.
    for other in ("abc", "def_dp3"):
        assert identity.server_board_path(SimpleNamespace(instance_id=other)) == path


def test_the_actors_of_ray_are_engines_that_a_board_is_made_for(monkeypatch: Any) -> None:
    from vllm.v1.engine import utils

    made: list[Any] = []
    monkeypatch.setattr(identity, "_prepare", made.append)
    for manager in (utils.CoreEngineProcManager, utils.CoreEngineActorManager):
        monkeypatch.setattr(manager, "__init__", lambda self, vllm_config, addresses: None)
    identity.install()
    utils.CoreEngineActorManager("configuration", addresses=None)
    assert made == ["configuration"]


def test_without_a_name_engines_find_the_board_by_instance(monkeypatch: Any) -> None:
    monkeypatch.delenv(identity.RUN_ID, raising=False)
    front_end, engine = SimpleNamespace(instance_id="abc"), SimpleNamespace(instance_id="abc_dp3")
    assert identity.server_board_path(front_end) == identity.server_board_path(engine)
