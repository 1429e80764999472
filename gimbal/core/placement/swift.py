"""Baseline: few swaps between hot and cool ranks, in the manner of vllm-ascend's SwiftBalancer.

Per layer, as its second policy describes: the hottest rank exchanges one expert with the coolest
rank that it has not yet exchanged with, whichever pair evens the two out most, until the hottest
rank is within `threshold` of the mean, `max_swaps` are done or no swap helps. Replica counts stay
as they are. It looks at total load only.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gimbal.core.contracts import FloatArray, IntArray, RoutingCounts, Topology
from gimbal.core.options import AtLeastOne, Count, option
from gimbal.core.placement.objective import replica_counts


def _swap_layer(
    slots: IntArray, unit: FloatArray, topology: Topology, threshold: float, max_swaps: int
) -> None:
    """Swaps experts of one layer in place; `slots` [ranks, per_rank], `unit` [experts] pairs."""
    load = unit[slots].sum(axis=1)
    used = np.eye(topology.ranks, dtype=bool)
    for _ in range(max_swaps):
        hot = int(np.argmax(load))
        if load[hot] <= threshold * load.mean():
            return
        best: tuple[int, int, int] | None = None
        for other in np.argsort(load, kind="stable").tolist():
            if used[hot, other]:
                continue
            change = unit[slots[hot]][:, None] - unit[slots[other]][None, :]
            worst = np.maximum(load[hot] - change, load[other] + change)
            twice = np.isin(slots[hot], slots[other])[:, None] | np.isin(slots[other], slots[hot])
            worst[twice] = np.inf
            flat = int(np.argmin(worst))
            if worst.flat[flat] < load[hot]:
                best = (other, *divmod(flat, worst.shape[1]))
                break
        if best is None:
            return
        cool, i, j = best
        moved = unit[slots[hot, i]] - unit[slots[cool, j]]
        slots[hot, i], slots[cool, j] = slots[cool, j], slots[hot, i]
        load[hot] -= moved
        load[cool] += moved
        used[hot, cool] = used[cool, hot] = True


@dataclass(frozen=True, slots=True)
class SwiftOptions:
    """Options of placer `swift`."""

    threshold: AtLeastOne = option(1.01, "a rank this many times above the mean is hot")
    max_swaps: Count = option(100, "most swaps per layer")


class SwiftPlacer:
    """Bounded swaps from the placement in force."""

    Options = SwiftOptions
    gated = False

    def __init__(self, options: SwiftOptions = SwiftOptions()) -> None:
        self._threshold, self._max_swaps = options.threshold, options.max_swaps

    def place(self, routing: RoutingCounts, topology: Topology, current: IntArray) -> IntArray:
        result = np.ascontiguousarray(current).copy()
        total = routing.counts.sum(axis=0)
        unit = total / replica_counts(current, total.shape[1])
        for layer in range(len(result)):
            view = result[layer].reshape(topology.ranks, topology.slots_per_rank)
            _swap_layer(view, unit[layer], topology, self._threshold, self._max_swaps)
        return result
