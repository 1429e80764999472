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

ENTRIES = 32
"""Entries of an expert with replicas: shares are rounded to 1/32. A power of two, over which the
multiplicative hash of consecutive tokens spreads exactly evenly."""


def quantize(shares: FloatArray, entries: int = ENTRIES) -> IntArray:
    """Whole entries per replica, summing to `entries` (largest remainder, ties to the first)."""
    exact = shares / shares.sum() * entries
    whole: IntArray = np.floor(exact).astype(np.int32)
    order = np.argsort(-(exact - whole), kind="stable")
    whole[order[: entries - int(whole.sum())]] += 1
    return whole


def weighted_rows(
    placement: IntArray, shares: FloatArray, experts: int
) -> list[tuple[int, int, IntArray]]:
    """(layer, expert, entries) of every expert with more than one replica.

    Args:
        placement: [layers, slots].
        shares: [layers, slots] of one source, see `near_split`.
        experts: logical experts.
    """
    rows = []
    for layer, slots in enumerate(placement):
        counts = np.bincount(slots, minlength=experts)
        for expert in np.flatnonzero(counts > 1):
            held = np.flatnonzero(slots == expert).astype(np.int32)
            rows.append((layer, int(expert), np.repeat(held, quantize(shares[layer, held]))))
    return rows


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
    rows = weighted_rows(placement, shares, table.shape[1])
    for layer, expert, entries in rows:
        table[layer, expert] = torch.from_numpy(entries).to(table.dtype)
        count[layer, expert] = len(entries)
    if rows:
        model_state.logical_to_physical_map[layers, :, :ENTRIES].copy_(table)
        model_state.logical_replica_count[layers].copy_(count)
    return len(rows)
