import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gimbal.core.contracts import RoutingCounts
from gimbal.core.feedback.sources import (
    expected_tokens,
    persistence,
    preferred_shares,
    rescaled,
    shrunk,
    stable_windows,
)

tokens = hnp.arrays(float, (3, 4), elements=st.floats(1.0, 1e4))


@given(tokens, st.floats(0.0, 1.0), tokens)
@settings(max_examples=100)
def test_moving_work_conserves_every_domain_and_every_expert(recent, movable, wish):
    preferred = wish / wish.sum(axis=0)
    expected = expected_tokens(recent, preferred, movable)
    np.testing.assert_allclose(expected.sum(axis=0), recent.sum(axis=0))
    rows = np.random.default_rng(0).uniform(1, 9, (3, 2, 5))
    moved = rescaled(RoutingCounts(rows), recent, expected).counts
    np.testing.assert_allclose(moved.sum(axis=0), rows.sum(axis=0))
    assert (moved >= -1e-9).all()


def test_rows_follow_the_work():
    rows = np.zeros((2, 1, 2))
    rows[0, 0, 0] = rows[1, 0, 1] = 100.0  # each source asks for its own expert
    recent = np.array([[50.0, 0.0], [0.0, 50.0]])
    half_moved = np.array([[25.0, 0.0], [25.0, 50.0]])
    moved = rescaled(RoutingCounts(rows), recent, half_moved).counts
    np.testing.assert_allclose(moved[:, 0], [[50, 0], [50, 100]])


@pytest.mark.parametrize(
    ("us_per_token", "demand", "expected"),
    [
        ([[1.0, 3.0], [3.0, 1.0]], [10, 10], [[1, 0], [0, 1]]),  # each its cheapest
        ([[1.0, 3.0], [1.0, 2.0]], [10, 10], [[1, 0], [0, 1]]),  # who gains most chooses first
        ([[1.0, 3.0], [2.0, 2.0]], [30, 10], [[2 / 3, 0.5], [1 / 3, 0.5]]),  # as load allows
        ([[2.0, 2.0], [2.0, 2.0]], [10, 10], [[0.5, 0.5], [0.5, 0.5]]),  # no preference
    ],
)
def test_preference_goes_as_far_as_load_allows(us_per_token, demand, expected):
    shares = preferred_shares(np.array(us_per_token), np.ones(2), np.array(demand, dtype=float))
    np.testing.assert_allclose(shares, expected)


def test_a_steady_mix_lengthens_the_horizon_and_a_change_resets_it():
    rng = np.random.default_rng(1)
    steady = [rng.multinomial(5000, [0.25] * 4).reshape(2, 2).astype(float) for _ in range(6)]
    other = rng.multinomial(5000, [0.4, 0.1, 0.1, 0.4]).reshape(2, 2).astype(float)
    assert stable_windows(steady) == 6
    assert stable_windows([*steady, other]) == 1
    assert stable_windows([other, *steady]) == 6
    assert stable_windows(steady * 3) == 8
    assert stable_windows([]) == stable_windows(steady[:1]) == 1


def windows(shares, count=2, seed=0):
    """`count` windows of Poisson counts whose sources ask by `shares` [sources, experts]."""
    rng = np.random.default_rng(seed)
    expected = 400.0 * np.asarray(shares)[:, None, :].repeat(3, axis=1)
    return [rng.poisson(expected).astype(float) for _ in range(count)]


def test_differences_that_are_noise_are_not_expected_again():
    before, now = windows(np.full((2, 16), 1 / 16))
    assert persistence(before, now) < 0.3
    flat = shrunk(RoutingCounts(now), 0.0).counts
    share = flat / flat.sum(axis=2, keepdims=True)
    np.testing.assert_allclose(share[0], share[1])


def test_differences_that_dispatch_keeps_up_are():
    left = np.r_[np.full(8, 0.11), np.full(8, 0.015)]
    before, now = windows([left, left[::-1]])
    assert persistence(before, now) > 0.9
    np.testing.assert_allclose(shrunk(RoutingCounts(now), 1.0).counts, now)


@given(hnp.arrays(float, (3, 2, 4), elements=st.floats(1.0, 1e3)), st.floats(0.0, 1.0))
@settings(max_examples=60)
def test_shrinking_keeps_every_experts_total(rows, kept):
    result = shrunk(RoutingCounts(rows), kept).counts
    np.testing.assert_allclose(result.sum(axis=0), rows.sum(axis=0))
    np.testing.assert_allclose(result.sum(axis=2), rows.sum(axis=2))
