"""What the live page is told."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm")
sys.path.insert(0, str(Path(__file__).parent))
from synthetic import Server

from gimbal.core.snapshot import Field
from gimbal.vllm_plugin.operator import history, latency, watcher


@pytest.fixture
def made(tmp_path: Path) -> Any:
    """Makes a server whose state is ready; nothing samples it but the test."""
    from fastapi.testclient import TestClient

    def make(engines: int = 4, **options: Any) -> tuple[Server, TestClient]:
        server = Server(tmp_path, engines, layers=3, experts=8, **options)
        return server, TestClient(asyncio.run(server.start()))

    return make


def watch(server: Server) -> Any:
    return server.app.state.gimbal_operator.watcher


def view(client: Any, query: str = "") -> dict[str, Any]:
    answer = client.get(f"/gimbal/view{query}")
    assert answer.status_code == 200
    found: dict[str, Any] = answer.json()
    return found


def test_a_page_gets_the_history_once_and_then_what_is_new(made: Any) -> None:
    server, client = made()
    server.live(7)
    first = view(client)
    assert len(first["samples"]) == first["taken"] == 8  # the server took one at its start
    server.live(1)
    later = view(client, f"?span=fine&after={first['taken']}")
    assert (later["taken"], len(later["samples"])) == (9, 1)
    assert later["since_s"] == first["since_s"]
    assert view(client, "?span=coarse")["samples"] == []


@pytest.mark.parametrize(
    "query", ["?span=week", "?after=1e3", "?after=", "?after=" + "9" * 40, "?span=fine&after=x"]
)
def test_what_is_no_question_is_one_line(made: Any, query: str) -> None:
    answer = made()[1].get(f"/gimbal/view{query}")
    assert answer.status_code == 400
    assert answer.json()["error"].startswith("view: ")


def test_a_request_is_explained_by_the_terms_that_decided(made: Any) -> None:
    server, client = made()
    server.rows.advance()
    server.request(3)
    decision = server.recent._kept[-1].decision
    [row] = view(client)["recent"]
    assert row["engine"] == decision.engine
    assert row["reason"] == "policy"
    assert row["terms"][0] == "queue"
    assert row["cost"] == pytest.approx(sum(row["cost_by_term"]), abs=1)
    order = np.argsort(decision.costs, kind="stable")
    assert row["runner_up"] == next(e for e in order if e != decision.engine)
    assert row["runner_up_cost"] >= row["cost"]
    assert row["cost_by_term"] == pytest.approx(decision.terms[:, decision.engine], abs=0.06)


def test_engines_are_columns(made: Any) -> None:
    server, client = made(engines=3)
    server.rows.advance()
    found = view(client)
    one = dict(zip(found["columns"], found["engines"][1], strict=True))
    assert one["engine"] == 1
    assert one["running_requests"] == server.rows.rows[1, Field.RUNNING_REQUESTS]
    assert one["kv"] == pytest.approx(server.rows.rows[1, Field.KV_BLOCKS_USED] / 8000, abs=1e-4)
    assert one["pressure_ms"] == pytest.approx(history.pressure_ms(server.rows.rows)[1], abs=1e-3)


def test_a_level_that_switched_itself_off_comes_first(made: Any) -> None:
    server, client = made()
    server.rows.advance()
    server.rows.rows[2, Field.QUEUE_OFF] = 1.0
    server.off = True
    server.live(1)
    server.rows.rows[2, Field.QUEUE_OFF] = 1.0
    found = view(client)
    assert found["levels"]["dispatch"] == found["levels"]["queue"] == "switched itself off"
    assert found["levels"]["placement"] == "on"
    assert found["trouble"][:2] == [
        "level dispatch has switched itself off; the log says why",
        "level queue has switched itself off in engine 2; the log says why",
    ]
    assert "level dispatch has switched itself off" in found["samples"][-1]["events"]


def test_all_api_servers_together(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watcher.latency, "read_histograms", lambda: {"ttft": {1.0: 5.0}})
    first, client = made(clients=2, index=0)
    second, other_client = made(clients=2, index=1)
    second.fallbacks = {"error": 2}
    for server in (first, second):
        server.rows.advance()
        server.request(1)
    second.request(2)
    for server in (second, first):
        watch(server).sample()
    found = view(client)
    assert found["front_ends"] == 2
    assert sum(found["decisions"].values()) == 3
    assert len(found["recent"]) == 3
    assert any("fell back 2 times" in line for line in found["trouble"])
    assert watch(first)._all_latencies() == {"ttft": {1.0: 10.0}}
    # Another API server that writes nonsense is passed over.
    watch(first)._others = [{"latency": 3, "dispatch": {}, "recent": [{}]}, {}]
    watch(first)._view = None
    assert sum(view(client)["decisions"].values()) == 1
    assert other_client is not client


def test_what_an_operator_switches_is_remembered(made: Any) -> None:
    server, client = made(key="secret")
    server.live(1)
    headers = {"Authorization": "Bearer secret"}
    answer = client.post("/gimbal/control", json={"policy": "vllm"}, headers=headers)
    assert answer.status_code == 200
    server.live(1)
    assert view(client)["samples"][-1]["events"] == ["control: {'policy': 'vllm'}"]


def test_the_form_needs_admin_and_a_key(made: Any) -> None:
    assert view(made(config={"admin": True})[1])["control"] is None
    assert view(made(config={"admin": False}, key="secret")[1])["control"] is None
    offered = view(made(key="secret")[1])["control"]
    assert offered["levels"] == ["dispatch", "queue", "feedback"]
    assert {"gimbal", "vllm"} <= set(offered["policies"])


def test_experts_are_asked_once_for_all_who_look(made: Any) -> None:
    server, client = made(engines=4)
    asked = []
    answers = server.client.engine_core.call_utility_all_async

    async def counted(*arguments: Any) -> Any:
        asked.append(arguments)
        return await answers(*arguments)

    server.client.engine_core.call_utility_all_async = counted
    found = [client.get("/gimbal/experts").json() for _ in range(3)]
    assert len(asked) == 1
    load = found[0]
    assert np.shape(load["ranks"]) == np.shape(load["before"]) == (3, 4)
    assert np.shape(load["experts"]) == (3, 8)
    np.testing.assert_allclose(np.mean(load["ranks"], axis=1), 100, atol=0.6)
    assert load["last"]["predicted_gain_us_per_step"] == 812.4
    assert len(load["received"]) == 3


def test_waits_by_size_are_those_of_the_window(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    server, client = made()
    counts = {"queue 0-127": {0.1: 50.0, 1.0: 50.0}}
    monkeypatch.setattr(watcher.latency, "read_histograms", lambda: counts)
    watch(server)._waits.clear()
    watch(server).history.taken["fine"] = 0
    watch(server).sample()
    counts = {"queue 0-127": {0.1: 50.0, 1.0: 60.0}}
    watch(server).history.taken["fine"] = 0
    watch(server).sample()
    [row] = watch(server)._queue(server.rows.rows)["waits"]
    assert row == ["0-127", 10.0, 550.0, 910.0]
    assert view(client)["queue"]["waits"] == [row]
    assert latency.QUEUE + row[0] in counts


def test_a_sample_that_fails_is_said_once_and_tried_again(
    made: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server, client = made()
    later = []

    class Loop:
        def call_later(self, *call: Any) -> None:
            later.append(call)

    monkeypatch.setattr(server.rows, "read", lambda: 1 / 0)
    for _ in range(3):
        watch(server)._again(Loop())
    assert len(later) == 3
    assert caplog.text.count("misses a sample: ZeroDivisionError") == 1
    monkeypatch.undo()
    watch(server)._again(Loop())
    assert view(client)["taken"] == 2


def test_a_server_without_gimbal_says_so(site: Any) -> None:
    client, _, _ = site(None)
    assert client.get("/gimbal/view").json()["levels"] is None
    assert client.get("/gimbal/experts").status_code == 404


def test_an_answer_is_json_whatever_the_rows_hold(made: Any) -> None:
    server, client = made()
    server.rows.advance()
    server.rows.rows[0, [Field.STEP_TIME_US, Field.KV_BLOCKS_USED]] = np.nan, np.inf
    watch(server).sample()
    found = view(client)
    assert found["samples"][-1]["step_ms"][0] >= 0.0
    assert found["engines"][0][found["columns"].index("kv")] == 0.0
