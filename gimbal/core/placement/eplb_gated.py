"""Baseline: EPLB that rearranges only if its placement is better balanced than the current one.

vLLM gates its default policy this way on ROCm (5 % there); here the threshold is 0 by default,
which is the least that spares moves that gain nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from gimbal.core.contracts import IntArray, RoutingCounts, Topology
from gimbal.core.options import Finite, option
from gimbal.core.placement.eplb import EplbOptions, EplbPlacer
from gimbal.core.placement.objective import balance


@dataclass(frozen=True, slots=True)
class GatedEplbOptions(EplbOptions):
    """Options of placer `eplb-gated`."""

    min_gain: Finite = option(0.0, "relative gain in balance that a rearrangement must exceed")


class GatedEplbPlacer:
    """EPLB behind a gate on the relative gain in balance (mean/max rank pairs)."""

    Options = GatedEplbOptions
    gated = False  # by the gain gate: it has its own

    def __init__(self, options: GatedEplbOptions = GatedEplbOptions()) -> None:
        self._min_gain = options.min_gain
        self._eplb = EplbPlacer(options)

    def place(self, routing: RoutingCounts, topology: Topology, current: IntArray) -> IntArray:
        proposed = self._eplb.place(routing, topology, current)
        before = balance(current, routing.counts, topology)
        after = balance(proposed, routing.counts, topology)
        return proposed if after > before * (1.0 + self._min_gain) else current.copy()
