import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gimbal.core.cost.depth import PrefillDepthCost
from gimbal.core.cost.online import WARM_STEPS

BUDGET = 8192
NAN, INFINITY = float("nan"), float("inf")


def chunk(tokens, depth):
    return tokens, tokens * (depth + tokens / 2)


def observe_chunks(model, steps, *, token=32.0, pair=1.6e-3, noise=0.05, deepest=120_000, seed=1):
    """Feeds chunks of a machine with these costs, in microseconds."""
    rng = random.Random(seed)
    for _ in range(steps):
        tokens, pairs = chunk(rng.choice([200, 1500, BUDGET]), rng.randrange(deepest))
        model.observe(tokens, pairs, (token * tokens + pair * pairs) * rng.gauss(1.0, noise))
    return model


@pytest.mark.parametrize(("token", "pair"), [(32.0, 1.6e-3), (450.0, 0.0), (5.0, 1e-2)])
def test_finds_the_machine(token, pair):
    model = observe_chunks(PrefillDepthCost(BUDGET), 400, token=token, pair=pair)
    for depth in (0, 20_000, 120_000):
        true, mean = token + pair * depth, token + pair * 60_000
        assert model.us_per_token(depth) == pytest.approx(true, rel=0.15, abs=0.02 * mean)


def test_says_nothing_before_it_has_seen_steps():
    model = observe_chunks(PrefillDepthCost(BUDGET), WARM_STEPS - 1)
    assert model.us_per_token(1000) == 0.0
    assert observe_chunks(model, 1).us_per_token(1000) > 0.0


def test_where_all_prompts_are_short_depth_is_not_blamed():
    """Nothing tells the two costs apart there, and a first deep prompt must not stop moving."""
    model = observe_chunks(PrefillDepthCost(BUDGET), 400, pair=0.0, deepest=500)
    assert model.us_per_token(250) == pytest.approx(32.0, rel=0.1)
    assert model.us_per_token(100_000) < 4 * 32.0


def test_a_stall_barely_moves_it():
    model = observe_chunks(PrefillDepthCost(BUDGET), 300)
    before = model.us_per_token(50_000)
    model.observe(*chunk(BUDGET, 50_000), 60e6)
    assert model.us_per_token(50_000) == pytest.approx(before, rel=0.25)


def test_follows_a_lasting_change():
    model = observe_chunks(PrefillDepthCost(BUDGET), 300)
    observe_chunks(model, 600, token=64.0, pair=3.2e-3, seed=2)
    assert model.us_per_token(50_000) == pytest.approx(64.0 + 160.0, rel=0.15)


def test_the_slowest_is_not_the_one_with_most_tokens():
    tokens, pairs = zip(chunk(8000, 0), chunk(3000, 110_000), strict=True)
    model = PrefillDepthCost(BUDGET)
    assert model.slowest(tokens, pairs) == 0  # until it knows better
    assert observe_chunks(model, 100).slowest(tokens, pairs) == 1


@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("value", [NAN, INFINITY, -INFINITY, 1e300])
def test_ignores_what_is_no_step(place, value):
    model = observe_chunks(PrefillDepthCost(BUDGET), 100)
    before = model.us_per_token(9000)
    step = [100, 100 * 500.0, 4000.0]
    step[place] = value
    model.observe(*step)
    assert (model.steps, model.us_per_token(9000)) == (100, before)


@pytest.mark.parametrize("part", ["_near", "_far", "_usual_residual"])
@pytest.mark.parametrize("value", [NAN, INFINITY, -INFINITY])
def test_a_poisoned_estimate_starts_anew(part, value):
    model = observe_chunks(PrefillDepthCost(BUDGET), 100)
    setattr(model, part, value)
    observe_chunks(model, 400, seed=2)
    assert model.us_per_token(0) == pytest.approx(32.0, rel=0.15)


@given(st.lists(st.tuples(*[st.one_of(st.floats(), st.floats(0, 1e6))] * 3)))
def test_whatever_it_is_told_it_says_numbers(steps):
    model = PrefillDepthCost(BUDGET)
    for step in steps:
        model.observe(*step)
        assert 0.0 <= model.us_per_token(50_000) < INFINITY
