"""vLLM's expert-load window, reduced to one row per rank without any kernel of its own per step.

The window tensor already holds every recorded step: what is added here is host-side notes per
window slot (when it was written, which share of its tokens were decodes). At a rearrangement the
window is reduced once, with weights that halve every `half_life_steps`.

Prefill and decode share a step's counts: a mixed step is divided in proportion to its tokens, as
one step's counts do not say which token asked. Steps of one kind, most of a lightly loaded
server's, are exact.
"""

from __future__ import annotations

from typing import Any

import numpy as np

CHUNK_ROWS = 64
"""Window rows reduced at once: bounds the temporary to a few megabytes."""


class WindowNotes:
    """Host-side notes beside the window's slots.

    Args:
        size: slots of vLLM's window.
        half_life_steps: a step's weight halves every so many steps.
    """

    def __init__(self, size: int, half_life_steps: float) -> None:
        self.half_life_steps = half_life_steps
        self._step = np.full(size, -1, dtype=np.int64)
        self._decode_share = np.zeros(size)

    def written(self, slot: int, step: int, prefill_tokens: int, decode_tokens: int) -> None:
        """Window slot `slot` now holds engine step `step`."""
        tokens = prefill_tokens + decode_tokens
        self._step[slot] = step
        self._decode_share[slot] = decode_tokens / tokens if tokens else 0.0

    def weights(self, now_step: int) -> tuple[np.ndarray, np.ndarray]:
        """([slots] weight of each step, [slots] weight times its share of decode tokens)."""
        age = np.maximum(now_step - self._step, 0)
        weight = np.where(self._step >= 0, 0.5 ** (age / self.half_life_steps), 0.0)
        return weight, weight * self._decode_share

    def newer_than(self, step: int) -> np.ndarray:
        """[slots] whether a slot holds a step after `step`."""
        return self._step > step

    @property
    def recorded(self) -> int:
        return int((self._step >= 0).sum())


def reduce_window(
    model_state: Any, raw: Any, notes: WindowNotes, now_step: int, stall_us: float
) -> Any:
    """This rank's row of one model (see `rows.PLANES`): a float64 vector on the window's device.

    Args:
        model_state: vLLM's ``EplbModelState``.
        raw: [layers, experts] the sum vLLM is about to reduce over ranks.
        notes: this process's notes on the window.
        now_step: engine steps so far.
        stall_us: what this rank's last rearrangement took.
    """
    import torch

    window = model_state.expert_load_window
    layers, experts = raw.shape
    weight, decode_weight = notes.weights(now_step)
    index = _logical_index(model_state.physical_to_logical_map, experts)
    planes = torch.zeros((3, layers, experts), dtype=torch.float64, device=window.device)
    weights = torch.from_numpy(np.stack([weight, decode_weight])).to(window.device)
    squares = torch.zeros((), dtype=torch.float64, device=window.device)
    for start in range(0, window.shape[0], CHUNK_ROWS):
        if not weight[start : start + CHUNK_ROWS].any():
            continue
        part = window[start : start + CHUNK_ROWS]
        logical = to_logical(part, index, experts).to(torch.float64)
        both = weights[:, start : start + CHUNK_ROWS]
        planes[:2] += torch.einsum("kt,tle->kle", both, logical)
        planes[2] += torch.einsum("t,tle->le", both[0], (logical > 0).to(torch.float64))
        squares += both[0] @ logical.sum(dim=(1, 2)) ** 2
    scalars = torch.tensor(
        [weight.sum(), notes.recorded, stall_us], dtype=torch.float64, device=window.device
    )
    row = [raw.to(torch.float64).reshape(-1), planes.reshape(-1), scalars, squares.reshape(1)]
    return torch.cat(row)


def to_logical(rows: Any, index: Any, experts: int) -> Any:
    """[rows, layers, experts] from `rows` [rows, layers, slots]; `index` is [layers, slots]."""
    import torch

    out = torch.zeros((*rows.shape[:2], experts + 1), dtype=rows.dtype, device=rows.device)
    out.scatter_add_(2, index.unsqueeze(0).expand_as(rows), rows)
    return out[..., :-1]


def _logical_index(physical_to_logical: Any, experts: int) -> Any:
    """Slots without an expert count into a column that is thrown away."""
    return physical_to_logical.masked_fill(physical_to_logical < 0, experts).long()


def carry_over(window: Any, old_map: Any, new_map: Any, experts: int) -> None:
    """Re-expresses `window` [steps, layers, slots] in the slots of `new_map`, in place.

    vLLM maps every recorded step with the map in force at the next rearrangement, which credits
    the wrong experts with steps recorded before a migration. All of an expert's count goes to
    its first slot: only sums over an expert's slots are read.

    Args:
        window: the load window, or the part of it that belongs to the layers committed.
        old_map, new_map: [layers, slots] the maps before and after the commit.
        experts: logical experts.
    """
    import torch

    logical = to_logical(window, _logical_index(old_map, experts), experts)
    slots = new_map.shape[1]
    first = torch.full((new_map.shape[0], experts + 1), slots, device=new_map.device)
    positions = torch.arange(slots, device=new_map.device).expand_as(new_map)
    first.scatter_reduce_(1, _logical_index(new_map, experts), positions, "amin")
    window.zero_()
    index = first[:, :-1].clamp(max=slots - 1).unsqueeze(0).expand_as(logical)
    window.scatter_add_(2, index, logical.to(window.dtype))
