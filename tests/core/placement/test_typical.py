import numpy as np
import pytest

from gimbal.core.contracts import RoutingCounts
from gimbal.core.placement.typical import at_typical_step, typical_share


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([50.0] * 20, 1.0),
        ([100.0] * 5 + [0.0] * 15, 0.25),
        ([2000.0] + [20.0] * 9, 0.1 * 1.09**2),  # one step holds nine tenths of the tokens
        ([0.0] * 4, 1.0),
    ],
)
def test_share_of_steps_as_large_as_the_average_tokens(tokens, expected):
    x = np.array(tokens)
    assert typical_share(x.sum(), (x * x).sum(), len(x)) == pytest.approx(expected, rel=1e-3)


def test_a_window_of_fewer_larger_steps_keeps_its_counts():
    counts = np.arange(6.0).reshape(1, 2, 3)
    routing = RoutingCounts(counts, np.full((1, 2, 3), 0.5), steps=40)
    larger = at_typical_step(routing, 0.25)
    assert larger.steps == 10
    np.testing.assert_array_equal(larger.counts, counts)
    np.testing.assert_allclose(larger.active, 1 - 0.5**4)
    assert at_typical_step(RoutingCounts(counts, steps=3), 0.1).steps == 1
