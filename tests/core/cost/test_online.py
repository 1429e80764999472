import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gimbal.core.cost.online import OnlineStepCost, smoothed

BUDGET = 512


def observe_steps(model, steps, *, base=8000.0, decode=120.0, token=900.0, noise=0.05, seed=1):
    """Feeds steps of a machine with these costs; returns the last true step."""
    rng = random.Random(seed)
    for _ in range(steps):
        prefill = rng.choice([0, 0, rng.randrange(1, BUDGET), BUDGET])
        decoding = rng.randrange(1, 40)
        true = base + decode * decoding + token * prefill
        model.observe(prefill, decoding, true * rng.gauss(1.0, noise))
    return model


@pytest.mark.parametrize(
    ("base", "decode", "token"),
    [(8000.0, 120.0, 900.0), (5900.0, 60.0, 12.0), (0.0, 800.0, 800.0), (30000.0, 0.0, 5.0)],
)
def test_finds_the_machine(base, decode, token):
    model = observe_steps(
        OnlineStepCost(BUDGET), 400, base=base, decode=decode, token=token, noise=0.01
    )
    for prefill, decoding in [(0, 20), (256, 20), (BUDGET, 35)]:
        true = base + decode * decoding + token * prefill
        assert model.predict_us(prefill, decoding) == pytest.approx(true, rel=0.1, abs=2000)
    assert model.prefill_us_per_token == pytest.approx(token, rel=0.1)


def test_sane_after_the_first_steps():
    model = OnlineStepCost(BUDGET)
    model.observe(BUDGET, 0, 460_000.0)
    assert 0 < model.prefill_us_per_token <= 460_000 / BUDGET
    assert model.predict_us(BUDGET, 0) == pytest.approx(460_000, rel=0.01)
    model.observe(0, 4, 12_000.0)
    assert model.step_base_us(4) == pytest.approx(12_000, rel=0.25)
    assert model.prefill_us_per_token == pytest.approx(448_000 / BUDGET, rel=0.05)


def test_a_stall_barely_moves_it():
    model = observe_steps(OnlineStepCost(BUDGET), 300)
    before = model.predict_us(256, 20)
    model.observe(0, 20, 2_000_000.0)
    assert model.clipped >= 1
    assert model.predict_us(256, 20) == pytest.approx(before, rel=0.1)


def test_follows_a_lasting_change():
    model = observe_steps(OnlineStepCost(BUDGET), 300, token=900.0)
    observe_steps(model, 600, token=1800.0, seed=2)
    assert model.prefill_us_per_token == pytest.approx(1800, rel=0.1)


def test_long_decoding_does_not_unlearn_prefill():
    model = observe_steps(OnlineStepCost(BUDGET), 300)
    rng = random.Random(3)
    for _ in range(20_000):
        model.observe(0, 20, (8000 + 120 * 20) * rng.gauss(1.0, 0.05))
    assert model.prefill_us_per_token == pytest.approx(900, rel=0.15)
    model.observe(BUDGET, 20, 2 * (8000 + 2400 + 900 * BUDGET))
    assert model.prefill_us_per_token < 1.7 * 900


def test_the_group_explains_steps_that_others_made_slow():
    told, untold = OnlineStepCost(BUDGET), OnlineStepCost(BUDGET)
    rng = random.Random(4)
    for _ in range(500):
        own, other = rng.choice([0, BUDGET]), rng.choice([0, BUDGET])
        duration = (8000.0 + 900.0 * max(own, other)) * rng.gauss(1.0, 0.02)
        told.observe(own, 0, duration, max(own, other))
        untold.observe(own, 0, duration)
    assert told.prefill_us_per_token == pytest.approx(900, rel=0.05)
    assert untold.prefill_us_per_token < 600


NAN, INFINITY = float("nan"), float("inf")
NO_STEPS = [
    {"duration_us": 0.0},
    {"duration_us": -5.0},
    {"duration_us": NAN},
    {"duration_us": INFINITY},
    {"duration_us": 1e300},
    {"prefill_tokens": NAN},
    {"prefill_tokens": INFINITY},
    {"prefill_tokens": -1},
    {"prefill_tokens": 1e6},
    {"decode_requests": NAN},
    {"decode_requests": -INFINITY},
    {"decode_requests": -1},
    {"decode_requests": 2.0**53},
    {"group_prefill_tokens": NAN},
    {"group_prefill_tokens": INFINITY},
    {"group_prefill_tokens": -1.0},
    {"group_prefill_tokens": 1e300},
]


@pytest.mark.parametrize("figures", NO_STEPS)
def test_ignores_what_is_no_step(figures):
    model = observe_steps(OnlineStepCost(BUDGET), 100)
    before = model.predict_us(256, 20)
    step = {"prefill_tokens": 10, "decode_requests": 1, "duration_us": 17_000.0, **figures}
    for _ in range(50):
        model.observe(**step)
    assert (model.steps, model.predict_us(256, 20)) == (100, before)
    observe_steps(model, 500, seed=2)
    assert model.prefill_us_per_token == pytest.approx(900, rel=0.1)


@pytest.mark.parametrize(
    ("part", "index"), [*(("_theta", i) for i in range(3)), *(("_p", i) for i in range(6))]
)
@pytest.mark.parametrize("value", [NAN, INFINITY, -INFINITY])
def test_a_poisoned_estimate_starts_anew(part, index, value):
    model = observe_steps(OnlineStepCost(BUDGET), 100)
    getattr(model, part)[index] = value
    observe_steps(model, 500, seed=2)
    assert model.prefill_us_per_token == pytest.approx(900, rel=0.1)
    assert model.predict_us(0, 20) == pytest.approx(8000 + 120 * 20, rel=0.1)


def test_a_poisoned_usual_residual_starts_anew():
    model = observe_steps(OnlineStepCost(BUDGET), 100)
    model._usual_residual = NAN
    observe_steps(model, 500, seed=2)
    assert model.prefill_us_per_token == pytest.approx(900, rel=0.1)


@given(
    st.lists(st.tuples(*[st.one_of(st.floats(), st.floats(0, 1e6))] * 3, st.none() | st.floats()))
)
def test_whatever_it_is_told_it_says_numbers(steps):
    model = OnlineStepCost(BUDGET)
    for step in steps:
        model.observe(*step)
        said = model.prefill_us_per_token, model.decode_us_per_request, model.predict_us(100, 10)
        assert all(0.0 <= value < INFINITY for value in said), said
    observe_steps(model, 20)
    assert all(0.0 <= value < INFINITY for value in (model.predict_us(100, 10),))


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (0.0, 5.0, 5.0),
        (10.0, 20.0, 12.0),
        (10.0, NAN, 10.0),
        (10.0, INFINITY, 10.0),
        (10.0, -1.0, 10.0),
        (NAN, 5.0, 5.0),
        (INFINITY, 5.0, 5.0),
        (-1.0, 5.0, 5.0),
        (NAN, NAN, 0.0),
    ],
)
def test_a_smoothed_value_takes_up_numbers_only(old, new, expected):
    assert smoothed(old, new) == expected


def test_never_negative():
    model = OnlineStepCost(BUDGET)
    rng = random.Random(5)
    for _ in range(500):
        model.observe(rng.randrange(BUDGET), rng.randrange(64), rng.uniform(1, 1e6))
        assert model.prefill_us_per_token >= 0
        assert model.decode_us_per_request >= 0
        assert model.step_base_us(0) >= 0


def test_a_law_with_a_negative_intercept_does_not_diverge():
    # Time that grows faster than linearly with the batch pulls the linear base below zero.
    rng = np.random.default_rng(0)
    cost = OnlineStepCost(8192)
    errors = []
    for step in range(4000):
        decodes = 150 + 100 * np.sin(step / 200) + rng.integers(0, 20)
        prefill = float(rng.integers(0, 4000)) if rng.random() < 0.5 else 0.0
        duration_us = 40.0 * decodes**1.3 + 5.0 * prefill
        if step > 200:
            errors.append(abs(cost.predict_us(prefill, decodes) / duration_us - 1))
        cost.observe(prefill, decodes, duration_us)
    assert np.mean(errors) < 0.2
    assert max(errors) < 2.0
