"""Replicas keep their places, their accounts and their rows while others come and go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from gimbal.board.published import Source
from gimbal.core.config import parse_config
from gimbal.core.contracts import DispatchRequest, EngineLoads
from gimbal.core.errors import InputError
from gimbal.core.snapshot import ACCEPTED_REQUESTS, ACCEPTED_TOKENS, ROW_WIDTH, Field
from gimbal.integrations.replicas import Prompt, Published, Replicas


class Rows:
    """A reader whose rows the test writes."""

    def __init__(self) -> None:
        self.known: dict[Source, np.ndarray] = {}
        self.followed: list[str] = []

    def follow(self, address: str) -> None:
        self.followed.append(address)

    def unfollow(self, address: str) -> None:
        self.followed.remove(address)

    def forget(self, source: Source) -> None:
        self.known.pop(source, None)

    def rows(self, sources: Sequence[Source]) -> np.ndarray:
        return np.array([self.known.get(source, np.zeros(ROW_WIDTH)) for source in sources])

    def say(self, name: str, now_us: float, epoch: float = 1.0, **fields: float) -> np.ndarray:
        row = self.known.setdefault(Source(name, 0), np.zeros(ROW_WIDTH))
        row[Field.SEQUENCE] += 1
        row[[Field.TIMESTAMP_US, Field.EPOCH]] = now_us, epoch
        row[[Field.STEP_TOKEN_BUDGET, Field.MAX_RUNNING_REQUESTS]] = 512, 256
        row[[Field.KV_BLOCKS_TOTAL, Field.KV_BLOCK_TOKENS]] = 10_000, 16
        for field, value in fields.items():
            row[Field[field.upper()]] = value
        return row


class World:
    """Replicas over rows and a clock of the test's."""

    def __init__(self, names: str, router: int = 0, **dispatch: Any) -> None:
        self.rows, self.now_us, self.number = Rows(), 1e9, 0
        config = parse_config({"dispatch": dispatch}).dispatch
        self.replicas = Replicas(self.rows, config, lambda: self.now_us, router)
        self.there(names)
        for name in names:
            self.say(name)

    def there(self, names: str) -> None:
        self.replicas.update({n: Published(f"tcp://{n}:1", Source(n, 0)) for n in names})

    def say(self, name: str, **fields: float) -> np.ndarray:
        return self.rows.say(name, self.now_us, **fields)

    def ranked(self, candidates: str, tokens: int = 100, name: str = "") -> str:
        self.number += 1
        request_id = name or f"r{self.number}"
        ranked = self.replicas.ranked(request_id, Prompt(tokens), list(candidates))
        assert sorted(ranked) == sorted(candidates)
        return "".join(ranked)

    def inflight(self, name: str) -> float:
        place = self.replicas._places[name]
        return float(self.replicas.dispatcher.ledger.inflight_requests[place])


@pytest.fixture(params=["gimbal", "vllm"])
def policy(request: Any) -> str:
    return str(request.param)


def test_the_choice_follows_pressure(policy: str) -> None:
    world = World("abc", policy=policy)
    waiting = {"waiting_requests": 3.0, "waiting_prefill_tokens": 3000.0}
    world.say("a", **waiting)
    world.say("b", waiting_requests=9.0, waiting_prefill_tokens=9000.0)
    assert world.ranked("abc") == "cab"
    world.say("c", waiting_requests=20.0, waiting_prefill_tokens=20_000.0)
    assert world.ranked("abc")[0] == "a"


def test_what_is_sent_counts_before_a_row_says_it() -> None:
    world = World("abc")
    first = [world.ranked("abc", 5000)[0] for _ in range(3)]
    assert sorted(first) == ["a", "b", "c"]
    row = world.say("a", waiting_requests=1.0, waiting_prefill_tokens=5000.0)
    row[[ACCEPTED_REQUESTS, ACCEPTED_TOKENS]] = 1.0, 5000.0
    world.ranked("abc")
    place = world.replicas._places["a"]
    assert world.replicas.dispatcher.ledger.unacked_tokens[place] in (0.0, 100.0)


def test_only_candidates_are_chosen(policy: str) -> None:
    world = World("abc", policy=policy)
    world.say("b", waiting_requests=9.0, waiting_prefill_tokens=9000.0)
    for _ in range(6):
        assert world.ranked("b") == "b"
    assert world.inflight("b") == 6.0


def test_without_signals_only_candidates_are_chosen_too() -> None:
    world = World("abc")
    for name in "abc":
        world.say(name, waiting_requests=1.0)
    world.now_us += 60e6
    chosen = [world.ranked("bc")[0] for _ in range(4)]
    assert sorted(chosen) == ["b", "b", "c", "c"]
    assert world.inflight("a") == 0.0


def test_a_request_asked_for_again_is_entered_once() -> None:
    world = World("ab")
    for _ in range(5):
        world.ranked("ab", name="r")
    assert world.inflight("a") + world.inflight("b") == 1.0
    world.replicas.sent("r", Prompt(100), "b")
    assert (world.inflight("a"), world.inflight("b")) == (0.0, 1.0)
    world.replicas.sent("r", Prompt(100), "gone")
    world.replicas.finished("r")
    world.replicas.unsent("r")
    assert world.inflight("b") == 0.0


def test_a_place_is_taken_by_the_next_replica_with_nothing_left_over(policy: str) -> None:
    world = World("abc", policy=policy)
    for _ in range(9):
        world.ranked("abc")
    world.say("b", waiting_requests=50.0, waiting_prefill_tokens=50_000.0)
    world.there("ac")
    assert world.rows.followed == ["tcp://a:1", "tcp://c:1"]
    assert Source("b", 0) not in world.rows.known
    assert world.ranked("ac")[0] in "ac"
    world.there("acd")
    world.rows.say("d", world.now_us, epoch=7.0)
    assert world.replicas.dispatcher.engines == 3, "the place of b"
    assert world.ranked("acd")[0] == "d"
    assert world.inflight("d") == 1.0


def test_many_come_and_go_and_places_stay_few() -> None:
    world = World("ab")
    for turn in range(50):
        names = [f"n{turn}-{i}" for i in range(turn % 5 + 1)]
        world.replicas.update(dict.fromkeys(names))
        ranked = world.replicas.ranked(f"r{turn}", Prompt(10), names)
        assert sorted(ranked) == sorted(names)
        world.replicas.finished(f"r{turn}")
    assert world.replicas.dispatcher.engines == 5
    world.replicas.update({})
    assert world.replicas.ranked("r", Prompt(1), ["nobody"]) == ["nobody"]


def test_replicas_that_publish_nothing_share_by_what_was_sent() -> None:
    world = World("")
    world.replicas.update(dict.fromkeys("abc"))
    chosen = [world.ranked("abc", 1000)[0] for _ in range(9)]
    assert {name: chosen.count(name) for name in "abc"} == {"a": 3, "b": 3, "c": 3}


def test_a_prompt_goes_where_its_prefix_is() -> None:
    world = World("abc")
    tokens = list(range(2000))
    home = world.replicas.ranked("first", Prompt(2000, tokens), list("abc"))[0]
    for name in "abc":
        row = world.say(name)
        if name == home:
            row[[ACCEPTED_REQUESTS, ACCEPTED_TOKENS]] = 1.0, 2000.0
    world.replicas.finished("first")
    for i in range(3):
        again = world.replicas.ranked(f"r{i}", Prompt(2000, tokens), list("abc"))
        assert again[0] == home
        world.replicas.unsent(f"r{i}")


@pytest.mark.parametrize("router", [0, 3])
def test_a_router_counts_the_acknowledgements_of_its_own_requests(router: int) -> None:
    """Another one's, in another column, take nothing from what this one has sent."""
    world = World("ab", router)
    unacked = world.replicas.dispatcher.ledger.unacked_tokens
    for _ in range(2):
        world.ranked("ab", 1000)
    world.say("a")[[ACCEPTED_REQUESTS + 7, ACCEPTED_TOKENS + 7]] = 1.0, 1000.0
    world.ranked("ab", 10)
    assert sorted(unacked.tolist()) == [1000.0, 1010.0]
    for name in "ab":
        world.say(name)[[ACCEPTED_REQUESTS + router, ACCEPTED_TOKENS + router]] = 1.0, 1000.0
    world.ranked("ab", 20)
    assert sorted(unacked.tolist()) == [10.0, 20.0]


class Failing:
    """A policy that fails."""

    def costs(self, request: DispatchRequest, loads: EngineLoads) -> np.ndarray:
        raise RuntimeError("out of\nthe blue")


def test_a_policy_that_fails_costs_no_request(caplog: Any) -> None:
    world = World("abc", policy=f"{__name__}:Failing")
    chosen = [world.ranked("abc", 1000)[0] for _ in range(6)]
    assert sorted(chosen) == ["a", "a", "b", "b", "c", "c"]
    assert world.replicas.fallbacks == 6
    (line,) = [r.message for r in caplog.records if "no choice" in r.message]
    assert "out of the blue" in line


def test_a_policy_that_is_none_is_refused() -> None:
    with pytest.raises(InputError, match=r"dispatch\.policy: unknown 'gimbl'"):
        World("a", policy="gimbl")
