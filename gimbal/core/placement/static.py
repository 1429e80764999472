"""Baseline: nothing ever moves (no EPLB)."""

from __future__ import annotations

from gimbal.core.contracts import IntArray, RoutingCounts, Topology


class StaticPlacer:
    """Keeps the placement in force."""

    gated = False

    def place(self, routing: RoutingCounts, topology: Topology, current: IntArray) -> IntArray:
        return current.copy()
