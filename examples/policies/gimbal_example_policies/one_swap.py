"""In each layer, swap the two experts that even out the busiest and the idlest rank most."""

import numpy as np

from gimbal.contracts import IntArray, RoutingCounts, Topology


class OneSwap:
    def place(self, routing: RoutingCounts, topology: Topology, current: IntArray) -> IntArray:
        """[layers, slots]; the gain gate decides whether the experts move."""
        placed = current.copy()
        for layer, total in zip(placed, routing.counts.sum(axis=0), strict=True):
            share = total / np.bincount(layer, minlength=len(total))  # replicas split their tokens
            ranks = layer.reshape(topology.ranks, -1)  # a view: swaps reach `placed`
            loads = share[ranks].sum(axis=1)
            hot, cold = ranks[loads.argmax()], ranks[loads.argmin()]
            uneven = np.abs(np.ptp(loads) / 2 - (share[hot][:, None] - share[cold]))
            give, take = np.unravel_index(uneven.argmin(), uneven.shape)
            if hot[give] not in cold and cold[take] not in hot:
                hot[give], cold[take] = cold[take], hot[give]
        return placed
