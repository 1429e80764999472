"""Is this map safe to commit? Checked on every rank before a rearrangement touches a weight."""

from __future__ import annotations

import hashlib

import numpy as np

from gimbal.core.contracts import IntArray, Placer, RoutingCounts, Topology
from gimbal.core.errors import InputError, PolicyError, one_line, with_type
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


def answer(
    name: str, placer: Placer, routing: RoutingCounts, topology: Topology, current: IntArray
) -> IntArray:
    """What the placer called `name` proposes: [layers, slots], checked by `check_answer`.

    Raises PolicyError naming it when it fails or proposes no placement.
    """
    try:
        placed = placer.place(routing, topology, current)
    except Exception as error:
        raise PolicyError(f"placer {name!r}: {with_type(error)}") from error
    return check_answer(name, placed, current, routing.counts.shape[2])


def check_answer(name: str, placed: object, current: IntArray, experts: int) -> IntArray:
    """`placed` as int32 when it is a placement of the shape of `current` [layers, slots].

    An expert may lie twice on a rank, as in vLLM's own placements; `problems` refuses that before
    a weight moves. Raises PolicyError naming the placer when it is no array of integers of that
    shape, names an expert that does not exist, or leaves one out.
    """
    layers, slots = current.shape
    try:
        array = np.asarray(placed)
        validate_placement(array, Topology(1, slots), layers, experts, "placement")
    except ValueError as error:  # rows of different lengths are no array; InputError is one too
        raise PolicyError(f"placer {name!r}: {one_line(error)}") from None
    return np.ascontiguousarray(array, dtype=np.int32)


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
