import numpy as np
import pytest

from gimbal.core.contracts import RoutingCounts
from gimbal.core.feedback.outlook import MOST_WINDOWS, Outlook, lasting_windows, window_overlap

HOT = np.array([[[900.0, 100, 500, 500]], [[100.0, 900, 500, 500]]])  # sources that differ
EVEN = np.array([[[600.0, 400, 500, 500]], [[600.0, 400, 500, 500]]])


def counts(rows):
    return RoutingCounts(np.array(rows, dtype=float), steps=10)


def observed(*windows, overlap=0.0):
    outlook = Outlook()
    for rows in windows:
        expected = outlook.observe(counts(rows), overlap)
    return outlook, expected.counts


def test_before_the_second_window_sources_are_taken_for_alike():
    outlook, expected = observed(HOT)
    assert (outlook.kept, outlook.windows) == (0.0, 1.0)
    np.testing.assert_allclose(expected[0], expected[1])
    np.testing.assert_allclose(expected.sum(axis=0), HOT.sum(axis=0))


def test_what_comes_back_is_kept_and_earns_for_long():
    both = HOT * [[[1.0]], [[0.5]]]  # sources differ, and so do experts over both
    outlook, expected = observed(both, both)
    assert outlook.kept == pytest.approx(1.0)
    assert outlook.lasting == pytest.approx(MOST_WINDOWS)
    np.testing.assert_allclose(expected, both)


@pytest.mark.parametrize(
    ("first", "second"), [(HOT, EVEN), (HOT, HOT[::-1]), (HOT, np.zeros_like(HOT))]
)
def test_differences_that_do_not_come_back_are_not_planned_for(first, second):
    outlook, expected = observed(first, second)
    assert outlook.kept == pytest.approx(0.0)
    np.testing.assert_allclose(
        expected[0] / max(expected[0].sum(), 1), expected[1] / max(expected[1].sum(), 1)
    )


def test_experts_that_cool_down_shorten_the_horizon():
    hot = np.array([[[900.0, 100, 100, 100]]])
    cooler = np.array([[[600.0, 200, 200, 200]]])  # half the deviation from an even spread
    outlook, _ = observed(hot, cooler)
    assert outlook.lasting == pytest.approx(lasting_windows(0.5))
    assert lasting_windows(0.5) == pytest.approx(2.0, abs=0.01)


@pytest.mark.parametrize(
    ("gains", "windows"),
    [
        ([], 1.0),  # steady routing alone is no reason to believe a prediction
        ([(100.0, 0.0)], 1.0),
        ([(100.0, -50.0)], 1.0),
        ([(100.0, 50.0)], MOST_WINDOWS / 2),
        ([(100.0, 300.0)], MOST_WINDOWS),  # more than promised is not more than proven
        ([(100.0, 100.0), (50.0, 0.0)], MOST_WINDOWS / 2),  # half of it is forgotten each time
        ([(0.0, 0.0)], 1.0),
    ],
)
def test_a_longer_horizon_has_to_be_earned(gains, windows):
    both = HOT * [[[1.0]], [[0.5]]]
    outlook, _ = observed(both, both)
    for predicted_us, realized_us in gains:
        outlook.realized(predicted_us, realized_us)
    assert outlook.windows == pytest.approx(windows)


def test_what_two_windows_share_says_nothing_about_the_next():
    rng = np.random.default_rng(0)
    old, shared, new = rng.poisson(20.0, (3, 2, 4, 32)).astype(float)
    first, second = old + shared, shared + new
    plain, _ = observed(first, second)
    corrected, _ = observed(first, second, overlap=0.5)
    assert plain.kept > 0.3
    assert corrected.kept < 0.1


def test_a_model_of_another_shape_starts_anew():
    outlook, expected = observed(HOT, HOT, np.ones((1, 2, 8)))
    assert (outlook.kept, outlook.lasting) == (0.0, 1.0)
    assert expected.shape == (1, 2, 8)


@pytest.mark.parametrize(
    ("between", "window", "half_life", "expected"),
    [
        (200, 100, 100.0, 0.0),
        (100, 100, 100.0, 0.0),
        (0, 100, 100.0, 1.0),
        (100, 1e9, 100.0, 0.5),  # an endless window halves
        (50, 100, 1e9, 0.5),  # without decay half of the steps are shared
    ],
)
def test_overlap_of_windows(between, window, half_life, expected):
    assert window_overlap(between, window, half_life) == pytest.approx(expected, abs=1e-6)
