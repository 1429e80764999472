"""The builders and checks that authors of policies are given."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gimbal.contracts import Field, InputError, OrderingTraits
from gimbal.core.dispatch import POLICIES
from gimbal.core.placement import PLACERS
from gimbal.core.queue import ORDERINGS
from gimbal.testing import (
    check_dispatch_policy,
    check_ordering,
    check_placer,
    loads,
    placement,
    queue_state,
    queued,
    request,
    routing,
    topology,
)


def test_loads_are_idle_but_for_what_is_said() -> None:
    state = loads(waiting_requests=[2, 0, 1], unacked_tokens=7, client_count=3)
    assert state.column(Field.WAITING_REQUESTS).tolist() == [2, 0, 1]
    assert state.unacked_tokens.tolist() == [7, 7, 7]
    assert state.column(Field.KV_BLOCKS_TOTAL).tolist() == [1000] * 3
    assert state.client_count == 3
    assert len(loads().board) == 2
    assert len(loads(5).board) == 5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: loads(waiting_request=1), "did you mean 'waiting_requests'"),
        (lambda: loads(waiting_requests=[1, 2], running_requests=[1]), "lengths [1, 2]"),
        (lambda: loads(3, waiting_requests=[1, 2]), "lengths [2, 3]"),
    ],
)
def test_columns_that_cannot_be(call: Any, message: str) -> None:
    with pytest.raises(InputError) as error:
        call()
    assert message in str(error.value)


def test_the_other_builders() -> None:
    assert (request(30, session="s").prompt_tokens, request().session) == (30, None)
    assert queued(5, priority=2).uncached_tokens == 5
    assert queue_state(3.0).now_s == 3.0
    assert routing([[[1, 2]]]).counts.shape == (1, 1, 2)
    window = routing(sources=2, layers=3, experts=8, seed=1, steps=4)
    assert window.counts.shape == (2, 3, 8)
    assert np.array_equal(window.counts, routing(sources=2, layers=3, seed=1).counts)
    assert placement(2, topology(2, 5).slots, 8).tolist() == [[0, 1, 2, 3, 4, 5, 6, 7, 0, 1]] * 2


@pytest.mark.parametrize("name", list(POLICIES))
def test_built_in_dispatch_policies_pass(name: str) -> None:
    check_dispatch_policy(name)


@pytest.mark.parametrize("name", list(ORDERINGS))
def test_built_in_orderings_pass(name: str) -> None:
    check_ordering(name)


@pytest.mark.parametrize("name", list(PLACERS))
def test_built_in_placers_pass(name: str) -> None:
    check_placer(name)


def test_options_reach_a_policy_that_is_named() -> None:
    check_dispatch_policy("llm-d", {"kv": 0.0})
    with pytest.raises(InputError, match="did you mean 'kv'"):
        check_dispatch_policy("llm-d", {"kvs": 0.0})


class Costs:
    """A dispatch policy that answers by a function."""

    def __init__(self, answer: Any, **attributes: Any) -> None:
        self.answer = answer
        vars(self).update(attributes)

    def costs(self, request: Any, loads: Any) -> Any:
        return self.answer(loads)


def spoil(loads: Any) -> Any:
    loads.board[:] += 1.0
    return np.zeros(len(loads.board))


class Terms(Costs):
    term_names = ("queue",)

    def priced(self, request: Any, loads: Any) -> Any:
        return np.ones((2, len(loads.board)))

    def session_bound_us(self, request: Any, loads: Any, engine: int) -> float:
        return float("nan")


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (Costs(lambda loads: [0.0]), "Costs, 1 engine that have said nothing yet, prompt of 1 tok"),
        (Costs(lambda loads: [0.0]), "costs are no array but [0.0]"),
        (Costs(lambda loads: np.zeros(1)), "2 engines that have said nothing yet, prompt of 1 tok"),
        (Costs(lambda loads: np.zeros(1)), "costs of shape (1,), expected (2,)"),
        (Costs(lambda loads: np.zeros(len(loads.board), bool)), "costs are no numbers but bool"),
        (Costs(lambda loads: loads.cached_tokens * np.nan), "costs are NaN"),
        (Costs(lambda loads: loads.cached_tokens + np.inf), "no engine can be chosen by [inf]"),
        (Costs(spoil), "it changed board"),
        (Terms(lambda loads: np.zeros(len(loads.board))), "the last row [1.] is not the costs"),
        (Terms(lambda loads: np.ones(len(loads.board))), "session_bound_us of engine 0 is nan"),
    ],
)
def test_dispatch_policies_that_fail_are_told_why(policy: Any, message: str) -> None:
    with pytest.raises(AssertionError) as error:
        check_dispatch_policy(policy)
    assert message in str(error.value)


class Keys:
    """An ordering that answers by a function."""

    def __init__(self, answer: Any, traits: OrderingTraits, bound: float = 1.0) -> None:
        self.answer, self.traits, self.bound = answer, traits, bound

    def key(self, request: Any, state: Any) -> Any:
        return self.answer(request, state)

    def keys(self, requests: Any, state: Any) -> Any:
        return [0.0] * (len(requests) - 1)

    def bound_s(self, *_: Any) -> float:
        return self.bound


PLAIN = OrderingTraits()


@pytest.mark.parametrize(
    ("ordering", "message"),
    [
        (Keys(lambda r, s: None, PLAIN), "queue ordering Keys, 0 waiting, 0 tokens/s: "),
        (Keys(lambda r, s: float("nan"), PLAIN), "key of a request is nan"),
        (Keys(lambda r, s: 1 / s.prefill_tokens_per_s, PLAIN), "0 tokens/s: queue ordering"),
        (Keys(lambda r, s: 1 / r.uncached_tokens, PLAIN), "ZeroDivisionError"),
        (Keys(lambda r, s: 0.0, OrderingTraits(dynamic=True)), "0 keys for 1 requests"),
        (Keys(lambda r, s: 0.0, OrderingTraits(True, shares_steps=True)), "dynamic, shares_steps"),
        (Keys(lambda r, s: 0.0, PLAIN, -1.0), "bound_s at 0 tokens/s is -1.0"),
    ],
)
def test_orderings_that_fail_are_told_why(ordering: Any, message: str) -> None:
    with pytest.raises(AssertionError) as error:
        check_ordering(ordering)
    assert message in str(error.value)


class Places:
    """A placer that answers by a function, and counts."""

    calls = 0

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def place(self, routing: Any, topology: Any, current: Any) -> Any:
        Places.calls += 1
        return self.answer(current)


def shift(current: Any) -> Any:
    current[:] = np.roll(current, 1, axis=1)
    return current


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda current: None, "placer Places, one rank, an empty window: placer 'Places': "),
        (lambda current: current[:, 1:], "shape (2, 7), expected (2, 8)"),
        (lambda current: current * 0, "expert 1 is missing"),
        (lambda current: current / 0.0, "expected integers"),
        (shift, "it changed the placement in force"),
        (lambda current: np.roll(current, Places.calls, axis=1), "answered differently"),
        (lambda current: np.sort(current), "two ranks with spare slots, an empty window: plac"),
    ],
)
@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")
def test_placers_that_fail_are_told_why(answer: Any, message: str) -> None:
    with pytest.raises(AssertionError) as error:
        check_placer(Places(answer))
    assert message in str(error.value)
