"""What a placer answers, before anything is made of it."""

import numpy as np
import pytest

from gimbal.core.contracts import RoutingCounts, Topology
from gimbal.core.errors import PolicyError
from gimbal.core.placement.verify import answer, check_answer

CURRENT = np.array([[0, 1, 2, 3], [3, 2, 1, 0]], dtype=np.int32)
EXPERTS = 4


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint8])
def test_a_placement_comes_back_as_int32(dtype):
    placed = check_answer("mine", CURRENT[::-1].astype(dtype), CURRENT, EXPERTS)
    assert placed.dtype == np.int32
    assert placed.flags.c_contiguous
    assert placed.tolist() == CURRENT[::-1].tolist()
    assert check_answer("mine", CURRENT.tolist(), CURRENT, EXPERTS).tolist() == CURRENT.tolist()


def test_replicas_may_lie_side_by_side():
    twice = np.array([[0, 0, 1, 1]], dtype=np.int32)
    assert check_answer("mine", twice, twice, 2).tolist() == twice.tolist()


@pytest.mark.parametrize(
    ("placed", "message"),
    [
        (None, "expected integers of shape [layer, slot]"),
        (CURRENT.astype(float), "expected integers of shape [layer, slot]"),
        (CURRENT == 1, "expected integers of shape [layer, slot]"),
        (CURRENT.ravel(), "expected integers of shape [layer, slot]"),
        (CURRENT[:1], "placement: shape (1, 4), expected (2, 4)"),
        (CURRENT[:, :3], "placement: shape (2, 3), expected (2, 4)"),
        (CURRENT + 1, "placement[0, 3]: expert 4 not in 0..3"),
        (CURRENT - 1, "placement[0, 0]: expert -1 not in 0..3"),
        (np.zeros_like(CURRENT), "placement[0]: expert 1 is missing"),
        ([[0, 1, 2, 3], [0]], "placer 'mine': "),
        ("0123", "expected integers of shape [layer, slot]"),
    ],
)
def test_what_is_no_placement_is_refused_by_the_placers_name(placed, message):
    with pytest.raises(PolicyError) as error:
        check_answer("mine", placed, CURRENT, EXPERTS)
    assert str(error.value).startswith("placer 'mine': ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


class Placer:
    def __init__(self, placed):
        self.placed = placed

    def place(self, routing, topology, current):
        return self.placed(current)


def test_asking_a_placer():
    routing = RoutingCounts(np.ones((1, 2, EXPERTS)))
    asked = routing, Topology(2, 2), CURRENT
    assert answer("mine", Placer(lambda c: c[::-1]), *asked).tolist() == CURRENT[::-1].tolist()
    with pytest.raises(PolicyError, match="placer 'mine': placement: shape"):
        answer("mine", Placer(lambda c: c.T), *asked)
    with pytest.raises(PolicyError, match="placer 'mine': ZeroDivisionError: division by zero"):
        answer("mine", Placer(lambda c: 1 / 0), *asked)
