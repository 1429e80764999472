"""Recorded routing: the ``.npz`` format of ``gimbal stats``, and readers of others' recordings.

================================  ============================================================
file                              what is read
================================  ============================================================
``.npz`` with ``counts``          ours: `save_routing`
``.npz`` with ``topk_idx``        per-token choices [layers, tokens, top_k], one source per file
``.npy`` [tokens, layers, top_k]  vLLM's ``routed_experts`` of a request or of many, one source
``.pt`` with ``logical_count``    SGLang's recorder, mode ``stat``: all ranks summed, one source
``.pt`` with ``records``          SGLang's recorder, modes ``per_pass``/``per_token``: one source
                                  per rank
================================  ============================================================
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from gimbal.core.contracts import FloatArray, IntArray, RoutingCounts
from gimbal.core.errors import InputError


@dataclass(frozen=True, slots=True)
class RoutingFile:
    """A recording.

    Attributes:
        counts: [sources, layers, experts] token-expert pairs.
        active: same shape, probability that a step activates the expert, or None.
        decode: same shape, the part of `counts` that decodes asked for, or None.
        physical_to_logical: [layers, slots] the map in force, or None.
        steps: engine steps the counts cover.
        metadata: anything JSON that says where it comes from.
    """

    counts: FloatArray
    active: FloatArray | None = None
    decode: FloatArray | None = None
    physical_to_logical: IntArray | None = None
    steps: int = 1
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def routing(self) -> RoutingCounts:
        return RoutingCounts(self.counts, self.active, self.steps)


_OPTIONAL = ("active", "decode", "physical_to_logical")


def save_routing(path: Path, routing: RoutingFile) -> None:
    """Writes the format that `read_routing` and ``gimbal place --routing`` read."""
    with path.open("wb") as file:
        write_routing(file, routing)


def write_routing(file: IO[bytes], routing: RoutingFile) -> None:
    """`save_routing` into an open file."""
    arrays = {n: getattr(routing, n) for n in _OPTIONAL if getattr(routing, n) is not None}
    np.savez_compressed(
        file,
        counts=routing.counts,
        steps=np.asarray(routing.steps),
        metadata=np.asarray(json.dumps(routing.metadata)),
        **arrays,
    )


def read_routing(paths: Path | Sequence[Path], experts: int | None = None) -> RoutingFile:
    """Reads one recording, or several as the sources of one in the order given.

    Args:
        paths: files of the module's table.
        experts: logical experts, where a recording of choices may not show them all.

    Raises:
        InputError: an unreadable file, shapes that do not fit, a choice beyond `experts`.
    """
    files = [_read(p, experts) for p in ([paths] if isinstance(paths, Path) else paths)]
    if not files:
        raise InputError("routing: no file given")
    if len(files) == 1:
        return files[0]
    width = max(f.counts.shape[2] for f in files)
    layers = {f.counts.shape[1] for f in files}
    if len(layers) > 1:
        raise InputError(f"routing: files differ in layers ({sorted(layers)})")
    padded = [np.pad(f.counts, ((0, 0), (0, 0), (0, width - f.counts.shape[2]))) for f in files]
    names = [str(f.metadata.get("source", "")) for f in files]
    return RoutingFile(
        np.concatenate(padded),
        steps=max(f.steps for f in files),
        metadata={"sources": names},
    )


def _read(path: Path, experts: int | None) -> RoutingFile:
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as data:
                return _from_npz(path, {name: data[name] for name in data.files}, experts)
        if path.suffix == ".npy":
            return _from_vllm(path, np.load(path, allow_pickle=False), experts)
        if path.suffix == ".pt":
            from gimbal.workloads.torch_archive import load_tensors

            return _from_sglang(path, load_tensors(path), experts)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: cannot be read: {error}") from None
    raise InputError(f"{path}: expected .npz, .npy or .pt")


def _from_npz(path: Path, data: dict[str, np.ndarray], experts: int | None) -> RoutingFile:
    if "counts" in data:
        counts = data["counts"].astype(np.float64)
        if counts.ndim != 3:
            raise InputError(
                f"{path}: counts: expected [source, layer, expert], got {counts.shape}"
            )
        optional = {name: data[name] for name in _OPTIONAL if name in data}
        metadata = json.loads(str(data["metadata"])) if "metadata" in data else {}
        return RoutingFile(counts, steps=int(data.get("steps", 1)), metadata=metadata, **optional)
    if "topk_idx" in data:
        counts = count_choices(data["topk_idx"], experts, str(path))
        steps = len(data["seq_len"]) if "seq_len" in data else 1
        return RoutingFile(counts[None], steps=steps, metadata={"source": path.stem})
    raise InputError(f"{path}: holds neither counts nor topk_idx, but {', '.join(sorted(data))}")


def _from_vllm(path: Path, choices: np.ndarray, experts: int | None) -> RoutingFile:
    if choices.ndim != 3:
        raise InputError(f"{path}: expected [tokens, layers, top_k], got {choices.shape}")
    counts = count_choices(choices.transpose(1, 0, 2), experts, str(path))
    return RoutingFile(counts[None], metadata={"source": path.stem})


def _from_sglang(path: Path, data: Any, experts: int | None) -> RoutingFile:
    if not isinstance(data, dict):
        raise InputError(f"{path}: expected a dictionary, got {type(data).__name__}")
    if "logical_count" in data:
        counts = np.asarray(data["logical_count"], dtype=np.float64)
        if counts.ndim not in (2, 3):
            raise InputError(f"{path}: logical_count: unexpected shape {counts.shape}")
        passes = counts.reshape(-1, *counts.shape[-2:])
        used = max(1, int(passes.any(axis=(1, 2)).sum()))
        return RoutingFile(passes.sum(axis=0)[None], steps=used, metadata={"source": path.stem})
    if "records" not in data or not data["records"]:
        raise InputError(f"{path}: holds neither logical_count nor records")
    # Recorded ids are physical: SGLang records after it has chosen a replica.
    table = np.asarray(data["last_physical_to_logical_map"])
    logical = experts or int(table.max()) + 1
    by_rank: dict[int, np.ndarray] = {}
    passes_of: dict[int, int] = {}
    for record in data["records"]:
        ids = np.asarray(record["topk_ids_of_layer"])
        rank = int(record["rank"])
        chosen = np.full(ids.shape, -1, dtype=np.int64)
        for layer in range(len(ids)):
            known = ids[layer] >= 0
            chosen[layer][known] = table[layer][ids[layer][known]]
        counts = count_choices(chosen, logical, str(path))
        by_rank[rank] = by_rank.get(rank, 0) + counts
        passes_of[rank] = passes_of.get(rank, 0) + 1
    stacked = np.stack([by_rank[rank] for rank in sorted(by_rank)])
    return RoutingFile(stacked, steps=max(passes_of.values()), metadata={"source": path.stem})


def count_choices(choices: np.ndarray, experts: int | None, where: str) -> FloatArray:
    """[layers, experts] from `choices` [layers, tokens, top_k]; negative entries are padding.

    Raises InputError when a choice is not below `experts`.
    """
    if choices.ndim != 3 or not np.issubdtype(choices.dtype, np.integer):
        raise InputError(f"{where}: choices: expected integers [layers, tokens, top_k]")
    flat = choices.reshape(len(choices), -1).astype(np.int64)
    highest = int(flat.max(initial=-1))
    width = experts or highest + 1
    if highest >= width:
        raise InputError(f"{where}: expert {highest} is chosen, but there are {width}")
    if width < 1:
        raise InputError(f"{where}: no expert is chosen")
    return np.stack([np.bincount(row[row >= 0], minlength=width) for row in flat]).astype(float)
