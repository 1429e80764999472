"""Logical to physical experts, and the count of what this rank routed: EPLB's eyes, on CPU.

The same rules as vLLM's GPU kernel (``eplb_map_to_physical_and_record``): a token's replica is
picked by a Knuth hash of its index, every physical expert is counted (not only local ones), and
padding and steps that are not recorded count nothing.
"""

from __future__ import annotations

import numpy as np
import torch

KNUTH_MULTIPLIER = 2654435769
"""floor(2**32 / golden ratio), the multiplicative hash vLLM uses."""


def map_to_physical_and_record(
    topk_ids: torch.Tensor,
    expert_load_view: torch.Tensor,
    logical_to_physical_map: torch.Tensor,
    logical_replica_count: torch.Tensor,
    record_enabled: torch.Tensor,
    num_unpadded_tokens: torch.Tensor | None = None,
) -> torch.Tensor:
    """Physical expert of every routed pair; adds the pairs to `expert_load_view` in place.

    Args:
        topk_ids: [tokens, k] logical experts; ids outside the model map to -1.
        expert_load_view: [physical experts] int32 running counts of this layer and pass.
        logical_to_physical_map: [logical experts, max replicas], -1 where unused.
        logical_replica_count: [logical experts].
        record_enabled: scalar bool.
        num_unpadded_tokens: scalar; rows from here on are padding and are not counted.

    Returns:
        [tokens, k], the dtype of `topk_ids`.
    """
    tokens = topk_ids.shape[0]
    if tokens == 0:
        return topk_ids
    ids = topk_ids.numpy()
    replicas = logical_replica_count.numpy()
    table = logical_to_physical_map.numpy()
    valid = None
    if ids.min() < 0 or ids.max() >= replicas.shape[0]:
        valid = (ids >= 0) & (ids < replicas.shape[0])
        ids = np.where(valid, ids, 0)
    if expert_load_view.shape[0] == replicas.shape[0]:  # no redundant experts
        physical = table[:, 0].take(ids)
    else:
        token_hash = (np.arange(tokens) * KNUTH_MULTIPLIER) & 0xFFFFFFFF
        count = np.maximum(replicas.take(ids), 1)
        physical = table[ids, token_hash[:, None] % count]
    if valid is not None:
        physical = np.where(valid, physical, -1)
    if bool(record_enabled):
        real = tokens if num_unpadded_tokens is None else int(num_unpadded_tokens)
        _count(expert_load_view.numpy(), physical[:real].reshape(-1))
    return torch.from_numpy(np.ascontiguousarray(physical)).to(topk_ids.dtype)


def _count(load: np.ndarray, physical: np.ndarray) -> None:
    """Adds one to `load` for every entry of `physical` that is an expert."""
    if physical.size and physical.min() < 0:
        physical = physical[physical >= 0]
    # Without the cap an id beyond the view would change the shape of the counts.
    load += np.bincount(physical, minlength=load.size)[: load.size].astype(load.dtype)
