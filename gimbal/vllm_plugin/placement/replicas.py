"""Each rank's own replica table: the replicas near it come first, as far as balance allows.

vLLM sends token i of an expert to entry ``hash(i) % count`` of the expert's row in
``logical_to_physical_map``. The row has room for 1,024 entries and belongs to this rank alone, so
repeating a replica in it makes a weighted choice with no change to any kernel: `ENTRIES` entries
in proportion to the shares `near_split` gave this rank's source.

Only safe where a token's expert is chosen once, by the rank that owns the token. Where every rank
repeats the choice for all tokens, tables that differ would make ranks disagree about who computes
a token; `controller` leaves vLLM's tables alone then.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gimbal.core.contracts import FloatArray, IntArray
from gimbal.core.placement.objective import replica_counts

ENTRIES = 32
"""Entries of an expert with replicas: shares are rounded to 1/32. A power of two, over which the
multiplicative hash of consecutive tokens spreads exactly evenly."""


def quantize(shares: FloatArray, entries: int = ENTRIES) -> IntArray:
    """[rows, replicas] whole entries that sum to `entries` in every row of `shares`.

    Largest remainder, ties to the first replica.
    """
    exact = shares / shares.sum(axis=1, keepdims=True) * entries
    whole: IntArray = np.floor(exact).astype(np.int32)
    missing = entries - whole.sum(axis=1, keepdims=True)
    order = np.argsort(-(exact - whole), axis=1, kind="stable")
    np.put_along_axis(
        whole,
        order,
        np.take_along_axis(whole, order, axis=1) + (np.arange(shares.shape[1]) < missing),
        axis=1,
    )
    return whole


def weighted_rows(
    placement: IntArray, shares: FloatArray, experts: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(layers [n], experts [n], entries [n, ENTRIES]) of experts with more than one replica.

    Args:
        placement: [layers, slots].
        shares: [layers, slots] of one source, see `near_split`.
        experts: logical experts.
    """
    replicas = replica_counts(placement, experts).astype(np.intp)
    first = np.cumsum(replicas, axis=1) - replicas
    layer, expert = np.nonzero(replicas > 1)
    if not len(layer):
        return layer, expert, np.zeros((0, ENTRIES), dtype=np.int32)
    by_expert = np.argsort(placement, axis=1, kind="stable")
    column = np.arange(replicas.max())
    held = replicas[layer, expert][:, None] > column
    place = np.minimum(first[layer, expert][:, None] + column, placement.shape[1] - 1)
    slots = by_expert[layer[:, None], place]
    counts = quantize(np.where(held, shares[layer[:, None], slots], 0.0))
    return layer, expert, np.repeat(slots.ravel(), counts.ravel()).reshape(-1, ENTRIES)


def write_tables(
    model_state: Any, placement: IntArray, shares: FloatArray, first_layer: int = 0
) -> int:
    """Puts `weighted_rows` into vLLM's tables; returns how many experts were written.

    One host-to-device copy per table: rows are edited in a host copy of the layers concerned.
    """
    import torch

    layers = slice(first_layer, first_layer + placement.shape[0])
    table = model_state.logical_to_physical_map[layers, :, :ENTRIES].cpu()
    count = model_state.logical_replica_count[layers].cpu()
    layer, expert, entries = weighted_rows(placement, shares, table.shape[1])
    if len(layer):
        table[layer, expert] = torch.from_numpy(entries).to(table.dtype)
        count[layer, expert] = ENTRIES
        model_state.logical_to_physical_map[layers, :, :ENTRIES].copy_(table)
        model_state.logical_replica_count[layers].copy_(count)
    return len(layer)
