"""Which replica serves which source: the nearest one, as far as balance allows.

vLLM spreads an expert's tokens evenly over its replicas, wherever they come from. Here each
source fills the replicas of its own engine first, then those of its node, then the rest, and a
replica takes tokens only up to `spill` times the mean rank load. A layer whose busiest rank would
end up above both that limit and the even split keeps the even split: locality never costs balance
beyond the limit.
"""

from __future__ import annotations

import numpy as np

from gimbal.core.contracts import FloatArray, IntArray, Topology
from gimbal.core.placement.problem import validate_counts, validate_placement

SPILL = 1.02
"""Limit of a rank's load over the mean, above which near replicas are passed over."""


def near_split(
    counts: FloatArray, placement: IntArray, topology: Topology, spill: float = SPILL
) -> FloatArray:
    """Shares of every source's tokens over the slots of the expert they ask for.

    Args:
        counts: [sources, layers, experts] expected token-expert pairs.
        placement: [layers, slots] physical_to_logical.
        topology: ranks, slots and nodes.
        spill: see the module.

    Returns:
        [sources, layers, slots]: for each source, layer and expert the shares of the expert's
        slots sum to 1. Even where a source has no demand.

    Raises:
        InputError: wrong shapes, bad counts or an expert without a slot.
    """
    from gimbal.core.placement.replica_split_kernel import split_layers

    validate_counts(counts, "counts")
    validate_placement(placement, topology, counts.shape[1], counts.shape[2], "placement")
    shares = np.zeros((counts.shape[0], *placement.shape))
    rank = np.arange(topology.slots) // topology.slots_per_rank
    split_layers(
        np.ascontiguousarray(counts, dtype=np.float64),
        np.ascontiguousarray(placement, dtype=np.int64),
        rank,
        rank // topology.ranks_per_source,
        rank // topology.ranks_per_node,
        np.arange(counts.shape[0]) * topology.ranks_per_source // topology.ranks_per_node,
        topology.ranks,
        spill,
        shares,
    )
    return shares
