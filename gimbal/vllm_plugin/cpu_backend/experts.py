"""A rank's share of an MoE layer: the token-expert pairs whose expert lives here.

vLLM's CPU kernel computes every pair it is given and has no way to skip one. So the local pairs
are compacted into rows with one expert each, which makes the work proportional to the local load
exactly as on a GPU, and the weighted rows are summed back per token. Tokens without a local
expert get zeros; the combine step adds up what the other ranks computed.

The index arithmetic runs in numpy on views of the tensors: for the few tokens of a decode step a
numpy call costs about a third of a torch one, and these calls are the whole overhead.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]
"""(out, rows, weights [rows, 1], local expert ids [rows, 1]); writes weighted expert outputs."""


def apply_local_experts(
    output: torch.Tensor,
    hidden_states: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor,
    kernel: Kernel,
) -> int:
    """Writes the weighted sum of each token's local experts to `output`.

    Args:
        output: [tokens, hidden], written in full.
        hidden_states: [tokens, hidden].
        topk_weights: [tokens, k] float32.
        topk_ids: [tokens, k] physical expert ids; negative ones are no expert.
        expert_map: [physical experts] int32, this rank's slot of each expert or -1.
        kernel: computes rows with one expert each.

    Returns:
        Token-expert pairs computed.

    Raises IndexError for an id beyond `expert_map`: the kernel would read past its weights.
    """
    tokens, k = topk_ids.shape
    ids = topk_ids.numpy().reshape(-1)
    slots = expert_map.numpy().take(ids)
    # A negative id would have wrapped around to the last experts.
    slots[ids < 0] = -1
    pairs = np.flatnonzero(slots >= 0)
    if pairs.size == 0:
        output.zero_()
        return 0
    rows = pairs // k
    local_hidden = torch.index_select(hidden_states, 0, torch.from_numpy(rows))
    local_weights = torch.from_numpy(topk_weights.numpy().reshape(-1).take(pairs)).unsqueeze(1)
    local_slots = torch.from_numpy(slots.take(pairs).astype(np.int32, copy=False)).unsqueeze(1)
    local_out = torch.empty_like(local_hidden)
    kernel(local_out, local_hidden, local_weights, local_slots)
    output.copy_(_sum_rows(local_out, rows, tokens))
    return int(pairs.size)


def _sum_rows(values: torch.Tensor, rows: np.ndarray, tokens: int) -> torch.Tensor:
    """[tokens, hidden] sums of `values` [pairs, hidden] over equal `rows`, which are sorted.

    ``embedding_bag`` accumulates in float32 and rounds once; an ``index_add_`` in bf16 rounds per
    pair and is slower from about 50 pairs on.
    """
    starts = torch.from_numpy(np.searchsorted(rows, np.arange(tokens)))
    return torch.embedding_bag(values, torch.arange(rows.size), starts, False, 0)[0]
