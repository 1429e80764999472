"""The dispatch hook over vLLM's real client class, without sockets and engines."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm")
from vllm import SamplingParams

from gimbal.vllm_plugin.dispatch import hook, user_session
from gimbal.vllm_plugin.dispatch.request import describe, session_of
from gimbal.vllm_plugin.engine import identity, remote
from tests.vllm_plugin.dispatch.fakes import ORIGINAL, Client, Server, request
from tests.vllm_plugin.exposition import samples


@pytest.fixture
def server(tmp_path: Path, monkeypatch: Any) -> Server:
    return Server(tmp_path, monkeypatch)


def inflight_tokens(server: Server) -> list[float]:
    return server.front_end.dispatcher.ledger.inflight[1].tolist()


def test_tokens_decide_where_vllm_counts_requests(server: Server) -> None:
    long = server.send("long", 8000)
    others = [server.send(f"short{i}", 100 + i) for i in range(3)]
    assert others == [1 - long] * 3


def test_vllms_books_are_kept_as_vllm_keeps_them(server: Server) -> None:
    index = server.send("a", 50)
    identity_of = server.client.core_engines[index]
    assert server.client.reqs_in_flight == {"a": identity_of}
    assert server.client.engine_inflight[identity_of] == 1
    assert server.client.lb_engines[index][0] == 1, "the snapshot's waiting count, as vLLM adds it"
    server.finish("a")
    assert server.client.reqs_in_flight == {}
    assert server.client.engine_inflight[identity_of] == 0
    assert inflight_tokens(server) == [0.0, 0.0]
    assert server.front_end.dispatcher.ledger.unacked.sum() == 51, "not acknowledged yet"
    server.accept(index, 50)
    server.publish()
    server.front_end.refresh()
    assert server.front_end.dispatcher.ledger.unacked.sum() == 0


@pytest.mark.parametrize("rank", [0, 1])
def test_a_pinned_rank_is_respected_and_accounted(server: Server, rank: int) -> None:
    for i in range(4):
        assert server.send(f"r{i}", 1000, data_parallel_rank=rank) == rank
    assert inflight_tokens(server)[rank] == 4000
    assert server.front_end.decisions[rank, "vllm", "pinned"] == 4
    assert server.send("free", 10) == 1 - rank


def test_chunks_of_a_streaming_session_stay_on_its_engine(server: Server) -> None:
    home = server.send("session", 10, resumable=True)
    server.publish(WAITING_PREFILL_TOKENS=[9000.0 if e == home else 0.0 for e in range(2)])
    assert server.send("session", 10, resumable=True) == home
    assert server.front_end.dispatcher.ledger.inflight[0].sum() == 1
    assert server.client.engine_inflight.total() == 1


def test_late_interaction_is_left_to_vllm(server: Server) -> None:
    pooling = SimpleNamespace(
        late_interaction_params=SimpleNamespace(mode="score_doc", query_key="k", query_uses=1)
    )
    indices = {server.send(f"d{i}", 10, pooling_params=pooling) for i in range(6)}
    assert len(indices) == 1, "documents follow their query"
    assert server.front_end.decisions.total() == 6
    assert all(reason == "late_interaction" for _, _, reason in server.front_end.decisions)


def test_policy_vllm_is_vllms_own_method(tmp_path: Path, monkeypatch: Any) -> None:
    server = Server(tmp_path, monkeypatch, policy="vllm")
    plain = Client()
    rng = np.random.default_rng(0)
    for i in range(60):
        sent = request(f"r{i}", int(rng.integers(1, 500)))
        expected = ORIGINAL(plain, request(f"r{i}"))
        assert server.front_end.route(server.client, sent, ORIGINAL) == expected
    assert server.client.lb_engines == plain.lb_engines


def test_an_old_snapshot_falls_back_to_inflight_tokens(server: Server) -> None:
    server.publish(age_s=5.0, RUNNING_REQUESTS=[1.0, 1.0], WAITING_PREFILL_TOKENS=[0.0, 9000.0])
    engines = [server.send("a", 500), server.send("b", 400), server.send("c", 50)]
    assert engines[1] == 1 - engines[0]
    assert engines[2] == engines[1], "400 tokens in flight are fewer than 500"
    assert server.front_end.guard.counts == {"stale": 3}
    assert not server.front_end.guard.disabled
    server.publish()
    server.send("d", 10)
    assert server.front_end.guard.counts == {"stale": 3}


def test_an_engine_elsewhere_that_says_nothing_is_missed(
    server: Server, monkeypatch: Any, caplog: Any
) -> None:
    front_end = server.front_end
    front_end.first_rows = remote.FirstRows("tcp://[::1]:29551", local=1)
    monkeypatch.setattr(remote, "FIRST_ROW_S", 0.0)
    rows = front_end.reader.read().copy()
    rows[1] = 0.0
    monkeypatch.setattr(front_end.reader, "read", lambda: rows)
    front_end.refresh()
    assert "no row of it" not in caplog.text, "it owes nothing"
    server.send("a", data_parallel_rank=1)
    front_end.refresh()
    assert "engine 1 has work and no row of it has come to tcp://[::1]:29551" in caplog.text


def test_an_idle_engine_that_said_so_long_ago_is_trusted(server: Server) -> None:
    server.publish(age_s=60.0)
    server.send("a", 10)
    assert server.front_end.guard.counts == {}


def test_a_failing_policy_falls_back_and_switches_itself_off(
    server: Server, monkeypatch: Any
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("injected")

    monkeypatch.setattr(server.front_end.dispatcher, "dispatch", broken)
    first = server.send("a", 500)
    assert server.send("b", 10) == 1 - first
    for i in range(40):
        server.send(f"r{i}", 10)
    assert server.front_end.guard.disabled
    assert server.front_end.guard.counts == {"error": 20}
    assert server.front_end.decisions.total() == 42, "no request was lost"
    assert len(server.client.reqs_in_flight) == 42


def test_when_even_the_accounts_fail_vllm_decides(server: Server, monkeypatch: Any) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("injected")

    for name in ("dispatch", "assigned"):
        monkeypatch.setattr(server.front_end.dispatcher, name, broken)
    assert server.send("a") in (0, 1)
    assert set(server.front_end.guard.counts) == {"error", "inflight_error", "not_entered"}
    assert list(server.client.reqs_in_flight) == ["a"]


def test_the_number_of_engines_may_change(server: Server) -> None:
    server.send("a", 100)
    server.client.core_engines.append((2).to_bytes(2, "little"))
    server.client.lb_engines.append([0, 0, 0.0])
    engines = {server.send(f"r{i}", 5000) for i in range(6)}
    assert engines == {0, 1, 2}
    del server.client.core_engines[1:], server.client.lb_engines[1:]
    assert server.send("z", 10) == 0
    server.finish("a", *(f"r{i}" for i in range(6)), "z")
    assert inflight_tokens(server) == [0.0]


def test_engines_are_in_the_metrics_before_the_first_request(
    server: Server, monkeypatch: Any
) -> None:
    """A front end that attaches inside a running loop, as vLLM's does, shows them from then on."""
    parallel = SimpleNamespace(
        data_parallel_size=2,
        data_parallel_size_local=2,
        data_parallel_external_lb=False,
        local_engines_only=False,
    )
    server.client.vllm_config = SimpleNamespace(
        additional_config={"gimbal": {"levels": ["dispatch"]}},
        parallel_config=parallel,
        model_config=SimpleNamespace(is_moe=True, served_model_name="before"),
        kv_events_config=None,
        speculative_config=None,
    )
    monkeypatch.setattr(hook, "server_board_path", lambda config: server.board.path)
    monkeypatch.setattr(user_session, "HTTP_SERVERS", ())
    server.publish(KV_BLOCKS_TOTAL=[70, 80], PREEMPTIONS=[0, 3])

    async def start() -> Any:
        return hook.attach(server.client)

    front_end = asyncio.run(start())
    assert front_end.guard.counts == {}
    found = samples("before")
    assert found["gimbal_engine_kv_blocks", "1", ""] == 80
    assert found["gimbal_engine_preemptions_total", "1", ""] == 3
    assert found["gimbal_fallback_total", "", "error"] == 0
    assert found["gimbal_dispatch_decisions_total", "0", "session"] == 0


def test_an_operator_switches_policy_and_level(server: Server) -> None:
    server.send("a")
    server.board.write_control({"policy": "round-robin"})
    assert len({server.send("b", 9000), server.send("c", 10)}) == 2
    server.board.write_control({"policy": "round-robin", "levels": []})
    server.send("d")
    used = [(policy, reason) for _, policy, reason in server.front_end.decisions.elements()]
    assert used.count(("gimbal", "policy")) == 1
    assert used.count(("round-robin", "policy")) == 2
    assert used.count(("vllm", "policy")) == 1
    assert server.front_end.status()["enabled"] is False


def test_a_board_that_cannot_be_read_costs_no_request(server: Server, monkeypatch: Any) -> None:
    def broken(*_: Any) -> None:
        raise OSError("injected")

    monkeypatch.setattr(server.front_end.reader, "rows", broken)
    first = server.send("a", 500)
    assert server.send("b", 10) == 1 - first
    assert server.front_end.guard.counts == {"error": 2}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"session_id": "s"}, "s"),
        ({"sampling_params": SamplingParams(extra_args={"session_id": "x"})}, "x"),
        ({"sampling_params": SamplingParams(extra_args={"session_id": 3})}, None),
        ({}, None),
    ],
)
def test_session_key(fields: dict[str, Any], expected: str | None) -> None:
    assert session_of(request("a", **fields)) == expected


def test_a_prompt_that_a_router_had_prefilled_is_loaded() -> None:
    def loaded(params: Any, loads: bool = True) -> int:
        sampling = SamplingParams(max_tokens=1, extra_args={"kv_transfer_params": params})
        return describe(request("a", 40, sampling_params=sampling), loads)[0].loaded_tokens

    assert loaded({"do_remote_prefill": True, "remote_engine_id": "p0"}) == 40
    assert loaded({"do_remote_prefill": True}, loads=False) == 0, "no engine could load it"
    assert loaded({"do_remote_decode": True}) == 0
    assert loaded("nonsense") == 0
    assert describe(request("b", 40), True)[0].loaded_tokens == 0


def test_prompts_with_more_than_tokens_are_not_indexed() -> None:
    entry, tokens = describe(request("a", 7, cache_salt="tenant"))
    assert (entry.prompt_tokens, tokens) == (7, None)


@pytest.mark.parametrize(
    ("parallel", "environment", "servers", "words"),
    [
        ({"data_parallel_size": 1}, {}, 1, "one engine"),
        ({"data_parallel_external_lb": True}, {}, 1, "external load balancer"),
        ({}, {"VLLM_USE_RUST_FRONTEND": "1"}, 1, "RUST_FRONTEND"),
        ({}, {}, 17, "at most 16"),
        ({}, {}, 16, None),
        ({"data_parallel_size": 257}, {}, 1, "257 engines: the signal board holds 256"),
        ({"data_parallel_size": 256}, {}, 1, None),
    ],
)
def test_why_dispatch_cannot_act(
    parallel: dict[str, Any],
    environment: dict[str, str],
    servers: int,
    words: str | None,
    monkeypatch: Any,
) -> None:
    monkeypatch.delenv("VLLM_USE_RUST_FRONTEND", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    base = {"data_parallel_size": 2, "data_parallel_external_lb": False}
    config = SimpleNamespace(parallel_config=SimpleNamespace(**(base | parallel)))
    reason = identity.why_dispatch_cannot_act(config, servers)
    assert (reason is None) if words is None else (reason is not None and words in reason)
