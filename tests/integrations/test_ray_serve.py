"""The router class: against a stand-in of Ray's interface, and in a local Ray Serve."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from gimbal.core.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
MODULE = "gimbal.integrations.ray_serve"


class FakeRouter:
    """What of Ray's ``RequestRouter`` is called."""

    def __init__(self) -> None:
        self.there: list[Any] = []

    def update_replicas(self, replicas: list[Any]) -> None:
        self.there = replicas

    def on_replica_actor_died(self, replica_id: Any) -> None:
        self.there = [r for r in self.there if r.replica_id != replica_id]


@pytest.fixture
def ray_serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The module, imported beside a stand-in of Ray."""
    stand_in: Any = ModuleType("ray.serve.request_router")
    stand_in.RequestRouter = FakeRouter
    stand_in.PendingRequest = stand_in.ReplicaID = stand_in.RunningReplica = SimpleNamespace
    for name in ("ray", "ray.serve", "ray.serve.request_router"):
        monkeypatch.setitem(sys.modules, name, stand_in)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    yield importlib.import_module(MODULE)
    sys.modules.pop(MODULE, None)


@pytest.fixture
def router(ray_serve: ModuleType) -> Iterator[Any]:
    made = ray_serve.GimbalRouter()
    made.initialize_state(listen=["@tcp://127.0.0.1:0"])
    yield made
    made._reader.close()


class ReplicaID(SimpleNamespace):
    def __hash__(self) -> int:
        return hash(self.unique_id)


def _replica(name: str, metadata: dict[str, Any] | None = None) -> Any:
    return SimpleNamespace(replica_id=ReplicaID(unique_id=name), replica_metadata=metadata or {})


def _pending(name: str, *args: Any) -> Any:
    return SimpleNamespace(
        args=list(args),
        kwargs={},
        metadata=SimpleNamespace(internal_request_id=name),
        future=asyncio.get_running_loop().create_future(),
        routing_context=SimpleNamespace(should_backoff=False),
    )


def _accounts(router: Any) -> dict[str, float]:
    """Requests in flight by replica."""
    inflight = router._choice.dispatcher.ledger.inflight_requests
    return {name: float(inflight[place]) for name, place in router._choice._places.items()}


PROMPT = {"prompt_token_ids": list(range(100))}


def test_a_request_is_accounted_for_from_choice_to_end(router: Any) -> None:
    replicas = [_replica(name) for name in "abc"]
    router.update_replicas(replicas)
    assert router.there == replicas

    async def life() -> None:
        pending = _pending("r", PROMPT)
        ranks = await router.choose_replicas(replicas, pending)
        assert sorted(len(rank) for rank in ranks) == [1, 1, 1]
        assert pending.routing_context.should_backoff, "Ray would ask again without a pause"
        best, second = ranks[0][0], ranks[1][0]
        await router.choose_replicas(replicas, pending)
        assert sum(_accounts(router).values()) == 1.0, "asked for twice"
        pending.future.set_result(second)  # the best was full
        await asyncio.sleep(0)
        name = second.replica_id.unique_id
        assert _accounts(router)[name] == 1.0
        assert _accounts(router)[best.replica_id.unique_id] == 0.0
        router.on_request_routed(pending, second.replica_id, None)
        router.on_request_completed(second.replica_id, "r")
        assert not any(_accounts(router).values())
        place = router._choice._places[name]
        assert router._choice.dispatcher.ledger.unacked_requests[place] == 1.0

    asyncio.run(life())
    assert not router._prompts
    assert not router._accepted
    assert not router._awaited


def test_what_no_replica_took_leaves_nothing_behind(router: Any) -> None:
    replicas = [_replica("a")]
    router.update_replicas(replicas)

    async def life() -> None:
        gone = _pending("gone", PROMPT)
        await router.choose_replicas(replicas, gone)
        gone.future.cancel()  # the caller hung up
        await asyncio.sleep(0)
        refused = _pending("refused", PROMPT)
        await router.choose_replicas(replicas, refused)
        refused.future.set_result(replicas[0])
        await asyncio.sleep(0)
        router.on_request_completed(replicas[0].replica_id, "refused")

    asyncio.run(life())
    ledger = router._choice.dispatcher.ledger
    assert not ledger.inflight_requests.any()
    assert not ledger.unacked_requests.any()
    assert not router._prompts


def test_calls_without_a_prompt_are_left_to_ray(router: Any) -> None:
    replicas = [_replica(name) for name in "abcd"]
    router.update_replicas(replicas)

    async def calls() -> None:
        for pending in (None, _pending("x"), _pending("y", 5, {"prompt": 3}, "text")):
            (rank,) = await router.choose_replicas(replicas, pending)
            assert len({r.replica_id.unique_id for r in rank}) == 2
        assert await router.choose_replicas([], None) == []
        assert await router.choose_replicas([], _pending("z", PROMPT)) == []

    asyncio.run(calls())
    assert not any(_accounts(router).values())


def test_a_choice_that_fails_is_left_to_ray_and_said_once(router: Any, caplog: Any) -> None:
    def fail(args: Any, kwargs: Any) -> Any:
        raise RuntimeError("out of\nthe blue")

    router._describe = fail
    replicas = [_replica(name) for name in "abc"]

    async def calls() -> None:
        for i in range(3):
            (rank,) = await router.choose_replicas(replicas, _pending(f"r{i}", PROMPT))
            assert len(rank) == 2

    asyncio.run(calls())
    (line,) = [record.message for record in caplog.records]
    assert "left to Ray: RuntimeError: out of the blue" in line


def test_metadata_names_where_rows_are(ray_serve: ModuleType, router: Any, caplog: Any) -> None:
    good = ray_serve.published_at("tcp://127.0.0.1:1", "a")
    assert good == {"gimbal": {"address": "tcp://127.0.0.1:1", "name": "a", "rank": 0}}
    bad = [
        {"gimbal": 3},
        {"gimbal": {"address": "tcp://x:1", "name": "x"}},
        {"gimbal": {"address": "@tcp://x:1", "name": "x", "rank": 0}},
        {"gimbal": {"address": "tcp://x:1", "name": "x\n", "rank": 0}},
        {},
    ]
    replicas = [_replica("a", good), *(_replica(f"b{i}", said) for i, said in enumerate(bad))]
    for _ in range(2):
        router.update_replicas(replicas)
    published = router._choice._published
    assert [name for name, where in published.items() if where is not None] == ["a"]
    assert len(published) == 6
    lines = [record.message for record in caplog.records]
    assert len(lines) == 5
    assert all("publishes no rows" in line and "\n" not in line for line in lines)
    router.on_replica_actor_died(replicas[0].replica_id)
    assert "a" not in router._choice._places
    assert replicas[0] not in router.there
    with pytest.raises(InputError, match="one tcp://HOST:PORT to call"):
        ray_serve.published_at("tcp://a:1,tcp://b:1", "a")


@pytest.mark.parametrize(
    ("arguments", "tokens", "ids"),
    [
        (({"prompt_token_ids": [1, 2, 3]},), 3, True),
        ((SimpleNamespace(prompt=[4, 5]),), 2, True),
        (({"prompt": "x" * 41},), 10, False),
        (({"prompt": "x"},), 1, False),
        (({"messages": [{"role": "user", "content": [{"text": "x" * 36}]}]},), 10, False),
        ((7, {"input": "x" * 8}), 2, False),
    ],
)
def test_prompts_are_found(
    ray_serve: ModuleType, arguments: tuple[Any, ...], tokens: int, ids: bool
) -> None:
    found = ray_serve.described(arguments, {})
    assert found.tokens == tokens
    assert (found.token_ids is not None) is ids
    by_name = ray_serve.described((), {"request": {"prompt": [1], "session_id": "s"}})
    assert by_name.session == "s"
    assert ray_serve.described(({"prompt": [1], "session_id": 3},), {}).session is None


@pytest.mark.parametrize("by_name", [False, True])
def test_a_router_that_marks_names_itself_in_a_copy(ray_serve: ModuleType, by_name: bool) -> None:
    router = ray_serve.GimbalRouter()
    router.initialize_state(listen=["@tcp://127.0.0.1:0"], marks=True)
    asked = {"prompt_token_ids": [1, 2, 3]}

    async def ask() -> Any:
        router.update_replicas([_replica("a"), _replica("b")])
        pending = _pending("r", *[] if by_name else ["x", asked])
        if by_name:
            pending.kwargs = {"n": 1, "request": asked}
        await router.choose_replicas(router.there, pending)
        return pending.kwargs["request"] if by_name else pending.args[1]

    sent = asyncio.run(ask())
    router._reader.close()
    assert sent == asked | {"gimbal_router": ray_serve.router_number()}
    assert 1 <= sent["gimbal_router"] <= 15
    assert "gimbal_router" not in asked


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"dispatch": {"polcy": "x"}}, "did you mean 'policy'"),
        ({"publish_secret_file": "/nowhere/secret"}, "no such file"),
        ({"listen": ["tcp:x"]}, "expected tcp://HOST:PORT"),
        ({"describe": "nowhere.x:f"}, "describe: 'nowhere.x:f': ModuleNotFoundError"),
        ({"describe": "json:nothing"}, "AttributeError"),
    ],
)
def test_wrong_arguments_are_named(ray_serve: ModuleType, kwargs: Any, said: str) -> None:
    with pytest.raises(InputError) as caught:
        ray_serve.GimbalRouter().initialize_state(**kwargs)
    assert said in str(caught.value)


def _in_ray(folder: Path, scenario: str, router: str = "gimbal") -> Any:
    """What `ray_replicas` found."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed (the extra `ray`)")
    file = folder / "found.json"
    command = [sys.executable, "-m", "tests.integrations.ray_replicas", scenario, router, str(file)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(file.read_text())


@pytest.mark.slow
def test_in_ray_choices_follow_rows(tmp_path: Path) -> None:
    found = _in_ray(tmp_path, "pressure")
    assert all("error" not in answer for answer in found["short"])
    served = Counter(answer["replica"] for answer in found["short"])
    assert found["long"]["replica"] not in served, "its row alone says that it is busy"
    assert sorted(served.values()) == [10, 10]
    assert {choice["known"] for choice in found["choices"]} == {3}
    ages_ms = [age for choice in found["choices"] for age in choice["ages_ms"]]
    assert 0.0 <= statistics.median(ages_ms) < 1000.0


@pytest.mark.slow
def test_in_ray_a_killed_replica_costs_what_was_on_it(tmp_path: Path) -> None:
    found = _in_ray(tmp_path, "killed")
    lost = [a for a in found["answers"] if "error" in a]
    # As with any router: Ray sends no request again that a replica had taken.
    assert {a["error"] for a in lost} == {"ActorDiedError"}
    assert 0 < len(lost) < found["unfinished"]
    assert len(found["answers"]) == 200
    assert all("error" not in answer for answer in found["after"])
    assert found["victim"]["replica"] not in {answer["replica"] for answer in found["after"]}
