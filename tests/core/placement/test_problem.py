"""Bad input: one line that names the array and the index."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from gimbal.core.contracts import RoutingCounts, Topology
from gimbal.core.errors import InputError
from gimbal.core.placement.forecast import Forecast
from gimbal.core.placement.problem import CostConstants, PlacementProblem, slots_per_rank
from gimbal.testing import placement

TOPOLOGY = Topology(4, 4)


def build(**changes: Any) -> PlacementProblem:
    counts = changes.pop("counts", np.ones((4, 2, 16)))
    topology = changes.pop("topology", TOPOLOGY)
    current = changes.pop("current", placement(2, 16, 16))
    active, steps = changes.pop("active", None), changes.pop("steps", 1)
    return PlacementProblem(RoutingCounts(counts, active, steps), topology, current, **changes)


def with_value(value: float) -> np.ndarray:
    counts = np.ones((4, 2, 16))
    counts[1, 0, 5] = value
    return counts


def missing() -> np.ndarray:
    current = placement(2, 16, 16)
    current[1, 3] = 0
    return current


BAD = [
    ({"counts": np.ones((2, 16))}, "counts: expected [source, layer, expert]"),
    ({"counts": np.ones((0, 2, 16))}, "counts: empty"),
    ({"counts": with_value(-1)}, "counts[1, 0, 5]: negative"),
    ({"counts": with_value(np.nan)}, "counts[1, 0, 5]: not finite"),
    ({"counts": with_value(np.inf)}, "counts[1, 0, 5]: not finite"),
    ({"counts": np.ones((3, 2, 16))}, "counts: axis 0 has 3 sources, topology has 4"),
    ({"topology": Topology(4, 3)}, "12 slots (4 ranks x 3) cannot hold 16 experts"),
    ({"topology": Topology(4, 17)}, "17 slots per rank but only 16 experts"),
    ({"topology": Topology(4, 4, 3)}, "ranks_per_source 3 does not divide 4"),
    ({"topology": Topology(4, 4, 2, 3)}, "cut a source"),
    ({"topology": Topology(0, 4)}, "ranks must be at least 1"),
    ({"current": placement(3, 16, 16)}, "current: shape (3, 16), expected (2, 16)"),
    ({"current": placement(2, 16, 16).astype(float)}, "current: expected integers"),
    ({"current": np.full((2, 16), 99)}, "current[0, 0]: expert 99 not in 0..15"),
    ({"current": missing()}, "current[1]: expert 3 is missing"),
    ({"active": np.full((4, 2, 16), 1.5)}, "active[0, 0, 0]: not a probability"),
    ({"active": np.ones((4, 2, 15))}, "active: shape"),
    ({"steps": 0}, "steps: must be at least 1"),
    ({"alpha": -1.0}, "alpha: -1.0: expected a number >= 0"),
    ({"gamma": float("nan")}, "gamma: nan: expected a number"),
    ({"backend": "deepep"}, "backend: unknown 'deepep'"),
    ({"horizon_steps": 0}, "horizon_steps"),
    ({"max_received": -1}, "max_received"),
    ({"expert_groups": 3}, "3 groups do not divide 16"),
    ({"forecast": Forecast(np.ones((2, 15)), None)}, "forecast factor: shape"),
    ({"forecast": Forecast(np.ones((2, 16)), -np.ones((2, 16)))}, "forecast spread[0, 0]"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_bad_input_names_what_and_where(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        build(**changes)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_ranks_that_do_not_divide_slots() -> None:
    with pytest.raises(InputError, match="288 slots do not divide over 64 ranks"):
        slots_per_rank(288, 64)


@pytest.mark.parametrize("name", ["us_per_pair", "expert_bytes", "same_node_gbps"])
def test_bad_constants(name: str) -> None:
    with pytest.raises(InputError, match=name):
        replace(CostConstants(), **{name: -1.0})
