"""Recorded routing: readers that turn files into counts [source, layer, expert].

- Gimbal's own ``.npz``: `counts`, optional `active`, `physical_to_logical`, `steps`.
- ESFT's expert scores (deepseek-ai/ESFT, one ``.npz`` per task with `topk_idx`
  [layers, tokens, k] and `seq_len` [sequences]): per-token routing of DeepSeek-V2-Lite.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gimbal.core.contracts import FloatArray, IntArray, RoutingCounts
from gimbal.core.errors import InputError


@dataclass(frozen=True, slots=True)
class TokenRouting:
    """Per-token routing of one task.

    Attributes:
        topk_idx: [layers, tokens, k] experts of each token.
        sequence: [tokens] which sequence (request) a token belongs to.
        experts: experts per layer.
    """

    topk_idx: npt.NDArray[np.uint8]
    sequence: IntArray
    experts: int


def open_npz(path: Path, *required: str) -> dict[str, np.ndarray]:
    """All arrays of an ``.npz``; raises InputError naming the file and the missing array."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: not a readable .npz file ({error})") from None
    for name in required:
        if name not in arrays:
            found = ", ".join(sorted(arrays)) or "nothing"
            raise InputError(f"{path}: no array {name!r} (found {found})")
    return arrays


def read_counts(path: Path) -> tuple[RoutingCounts, IntArray | None]:
    """Counts, and the placement they were recorded under when the file holds it."""
    arrays = open_npz(path, "counts")
    counts = _numbers(arrays["counts"], path, "counts")
    if counts.ndim == 2:  # [layer, expert]: the sources are unknown
        counts = counts[None]
    active = _numbers(arrays["active"], path, "active") if "active" in arrays else None
    steps = int(arrays["steps"]) if "steps" in arrays else 1
    placement = arrays.get("physical_to_logical")
    if placement is not None:
        placement = np.asarray(placement, dtype=np.int32)
    return RoutingCounts(counts, active, steps), placement


def read_placement(path: Path) -> IntArray:
    """`physical_to_logical` [layer, slot] of an ``.npz``."""
    placement = open_npz(path, "physical_to_logical")["physical_to_logical"]
    if not np.issubdtype(placement.dtype, np.integer):
        raise InputError(f"{path}: physical_to_logical must be integers, is {placement.dtype}")
    return placement.astype(np.int32)


def _numbers(array: np.ndarray, path: Path, name: str) -> FloatArray:
    if array.dtype.kind not in "fiub":
        raise InputError(f"{path}: {name} must be numbers, is {array.dtype}")
    return array.astype(np.float64)


def read_esft(path: Path, experts: int = 64) -> TokenRouting:
    """One task of ESFT's recorded routing."""
    arrays = open_npz(path, "topk_idx", "seq_len")
    topk, lengths = arrays["topk_idx"], arrays["seq_len"]
    if topk.ndim != 3 or int(lengths.sum()) != topk.shape[1]:
        raise InputError(f"{path}: seq_len adds up to {lengths.sum()}, topk_idx is {topk.shape}")
    if int(topk.max()) >= experts:
        raise InputError(f"{path}: topk_idx holds expert {topk.max()}, expected under {experts}")
    sequence = np.repeat(np.arange(len(lengths)), lengths).astype(np.int32)
    return TokenRouting(topk, sequence, experts)


def count_tokens(routing: TokenRouting, tokens: npt.NDArray[np.bool_]) -> FloatArray:
    """[layers, experts] token-expert pairs of the tokens where `tokens` [tokens] is true."""
    chosen = routing.topk_idx[:, tokens]
    layers = len(chosen)
    keys = chosen.astype(np.int64) + routing.experts * np.arange(layers)[:, None, None]
    counts = np.bincount(keys.ravel(), minlength=layers * routing.experts)
    return counts.reshape(layers, routing.experts).astype(np.float64)
