"""The loop dispatch -> load -> pressure -> dispatch: when it settles, and that it would not."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gimbal.core.feedback.damping import (
    MARGIN,
    DampedSignal,
    delay_updates,
    gain,
    gain_limit,
)


def largest_root(filter_gain, loop_gain, delay):
    """Of z^(d+1) - (1 - g) z^d + g K: the loop settles when it is below 1."""
    polynomial = np.zeros(delay + 2)
    polynomial[0] += 1.0
    polynomial[1] -= 1.0 - filter_gain
    polynomial[-1] += filter_gain * loop_gain
    return np.abs(np.roots(polynomial)).max()


@given(st.floats(0.001, 1.0), st.floats(0.0, 50.0), st.integers(0, 40))
@settings(max_examples=300)
def test_the_stated_conditions_put_every_root_inside_the_unit_circle(g, loop_gain, delay):
    if loop_gain < 0.999 or g * loop_gain < 0.999 * gain_limit(delay):
        assert largest_root(g, loop_gain, delay) < 1.0


@pytest.mark.parametrize("delay", range(0, 30, 3))
@pytest.mark.parametrize("g", [0.01, 0.1, 0.3, 0.6, 0.9, 1.0])
def test_just_below_the_bound_the_loop_is_stable(g, delay):
    assert largest_root(g, 0.999 * gain_limit(delay) / g, delay) < 1.0


@pytest.mark.parametrize("delay", [1, 3, 10, 30])
def test_the_bound_is_tight_for_a_slow_filter(delay):
    g = 1e-4
    assert largest_root(g, 1.02 * gain_limit(delay) / g, delay) > 1.0


@given(st.floats(0.0, 100.0), st.integers(0, 50))
@settings(max_examples=200)
def test_the_derived_gain_bears_almost_twice_the_loop_gain(loop_gain, delay):
    g = gain(loop_gain, delay)
    assert 0 < g <= 1
    assert largest_root(g, 0.99 * MARGIN * loop_gain, delay) < 1.0


def plant(filter_gain, loop_gain, delay, updates=600, noise=0.0, seed=0, engines=2):
    """[updates, engines] pressure of engines that share a load which pressure moves.

    The imbalance w is the experts'; dispatch answers the damped pressure's difference from its
    mean at once, and its answer is measured `delay` updates later, with white noise on top. An
    engine's pressure cannot be negative, nor exceed what all the load on it would cause.
    """
    rng = np.random.default_rng(seed)
    own = np.linspace(1.0, 0.0, engines) * 100.0
    signal = DampedSignal(engines, filter_gain)
    published = [signal.value] * (delay + 1)
    seen = []
    for _ in range(updates):
        answered = published[-delay - 1]
        pressure = np.clip(own - loop_gain * (answered - answered.mean()), 0.0, 200.0)
        seen.append(pressure)
        measured = pressure + noise * rng.standard_normal(engines)
        published.append(signal.update(measured))
    return np.array(seen)


CASES = [(1.5, 4), (3.0, 8), (10.0, 3), (6.0, 20)]


@pytest.mark.parametrize(("loop_gain", "delay"), CASES)
def test_damped_the_loop_settles_at_its_resting_point(loop_gain, delay):
    seen = plant(gain(loop_gain, delay), loop_gain, delay)
    assert np.ptp(seen[-100:], axis=0).max() < 0.01
    difference = seen[-1, 0] - seen[-1, 1]
    assert difference == pytest.approx(100.0 / (1.0 + loop_gain), rel=0.01)


@pytest.mark.parametrize(("loop_gain", "delay"), CASES)
def test_undamped_the_same_loop_swings_for_ever(loop_gain, delay):
    seen = plant(1.0, loop_gain, delay)
    assert np.ptp(seen[-100:], axis=0).max() > 50.0


@pytest.mark.parametrize(("loop_gain", "delay"), CASES)
def test_noise_is_not_amplified(loop_gain, delay):
    swings = {}
    for name, g in (("damped", gain(loop_gain, delay)), ("raw", 1.0)):
        seen = plant(g, loop_gain, delay, updates=3000, noise=5.0)
        swings[name] = seen[-2000:, 0].std()
    resting = plant(gain(loop_gain, delay), 0.0, delay, updates=50)[-1, 0]
    assert swings["damped"] < 0.3 * swings["raw"]
    assert swings["damped"] < 0.2 * resting


def test_a_loop_that_needs_no_damping_gets_none():
    assert gain(0.4, 30) == 1.0
    assert gain(0.6, 30) < 1.0


def test_delay_counts_age_response_and_half_a_window():
    assert delay_updates(0.0, 0.0, 10.0) == 1
    assert delay_updates(20.0, 15.0, 10.0) == 4


@pytest.mark.parametrize("arguments", [(-1.0, 3), (1.0, -1), (1.0, 3, 0.5), (float("nan"), 1)])
def test_bad_arguments(arguments):
    with pytest.raises(ValueError, match="loop gain"):
        gain(*arguments)


def test_a_gain_outside_its_range_is_refused():
    with pytest.raises(ValueError, match="filter gain"):
        DampedSignal(2, 0.0)
