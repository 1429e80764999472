"""Baseline: EPLB that rearranges only if its placement is better balanced than the current one.

vLLM gates its default policy this way on ROCm (5 % there); here the threshold is 0 by default,
which is the least that spares moves that gain nothing.
"""

from __future__ import annotations

from gimbal.core.contracts import IntArray, RoutingCounts, Topology
from gimbal.core.placement.eplb import EplbPlacer
from gimbal.core.placement.objective import balance


class GatedEplbPlacer:
    """EPLB behind a gate on the relative gain in balance (mean/max rank pairs)."""

    def __init__(self, min_gain: float = 0.0, groups: int = 1, nodes: int = 1) -> None:
        self._min_gain = min_gain
        self._eplb = EplbPlacer(groups, nodes)

    def place(self, routing: RoutingCounts, topology: Topology, current: IntArray) -> IntArray:
        proposed = self._eplb.place(routing, topology, current)
        before = balance(current, routing.counts, topology)
        after = balance(proposed, routing.counts, topology)
        return proposed if after > before * (1.0 + self._min_gain) else current.copy()
