"""Is this map safe to commit? Checked on every rank before a rearrangement touches a weight."""

from __future__ import annotations

import hashlib

import numpy as np

from gimbal.core.contracts import IntArray, Topology
from gimbal.core.errors import InputError
from gimbal.core.placement.problem import validate_placement


def problems(
    physical_to_logical: IntArray, topology: Topology, layers: int, experts: int
) -> str | None:
    """What is wrong with a proposed map, or None when it may be committed.

    Args:
        physical_to_logical: [layers, slots].
        topology: slots per rank and ranks the map must fit.
        layers, experts: shape of the model.
    """
    try:
        validate_placement(physical_to_logical, topology, layers, experts, "placement")
    except InputError as error:
        return str(error)
    per_rank = np.sort(physical_to_logical.reshape(layers, topology.ranks, -1), axis=2)
    twice = per_rank[:, :, 1:] == per_rank[:, :, :-1]
    if twice.any():
        layer, rank, slot = (int(i) for i in np.argwhere(twice)[0])
        expert = int(per_rank[layer, rank, slot])
        return f"placement[{layer}]: rank {rank} holds expert {expert} twice"
    return None


def check(physical_to_logical: IntArray, topology: Topology, layers: int, experts: int) -> str:
    """Returns the map's hash; raises InputError saying what and where when it is not valid."""
    problem = problems(physical_to_logical, topology, layers, experts)
    if problem is not None:
        raise InputError(problem)
    return digest(physical_to_logical)


def digest(physical_to_logical: IntArray) -> str:
    """64-bit hash (16 hex digits) of the map, the same in every process and on every machine."""
    data = np.ascontiguousarray(physical_to_logical, dtype="<i4")
    shape = np.asarray(data.shape, dtype="<i8").tobytes()
    return hashlib.blake2b(shape + data.tobytes(), digest_size=8).hexdigest()
