"""Snapshots of which rank holds which expert, for the report's heat maps."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from gimbal.core.contracts import FloatArray, IntArray
from gimbal.records.schema import PlacementRecord


def placement_record(
    time_s: float,
    committed: bool,
    pairs: FloatArray,
    before: IntArray,
    after: IntArray,
    slots_per_rank: int,
) -> PlacementRecord:
    """One rearrangement as a record.

    Args:
        pairs: [layers, experts] what was asked for in the window it was planned on.
        before, after: [layers, slots] physical_to_logical.
    """
    mean = np.maximum(pairs.mean(axis=1, keepdims=True), 1e-300)
    return PlacementRecord(
        time_s,
        committed,
        tuple(tuple(row) for row in np.round(pairs / mean, 2).tolist()),
        _ranks(before, pairs.shape[1], slots_per_rank),
        _ranks(after, pairs.shape[1], slots_per_rank),
    )


def _ranks(placement: IntArray, experts: int, slots_per_rank: int) -> tuple[tuple[int, ...], ...]:
    """[layers, experts] the rank of each expert's first replica."""
    ranks = np.zeros((len(placement), experts), dtype=np.int64)
    layers = np.arange(len(placement))
    for slot in reversed(range(placement.shape[1])):
        held = placement[:, slot] >= 0
        ranks[layers[held], placement[held, slot]] = slot // slots_per_rank
    return tuple(tuple(row) for row in ranks.tolist())


def rank_load(pairs: npt.ArrayLike, ranks: npt.ArrayLike) -> FloatArray:
    """[layers, ranks] load over the layer's mean rank; replicas count at their first one."""
    load, where = np.asarray(pairs, dtype=float), np.asarray(ranks, dtype=np.int64)
    count = int(where.max()) + 1
    sums = np.stack([np.where(where == r, load, 0.0).sum(axis=1) for r in range(count)], axis=1)
    return np.asarray(sums / np.maximum(sums.mean(axis=1, keepdims=True), 1e-300))
