"""Recorded routing: the ``.npz`` format of ``gimbal stats``, and readers of others' recordings.

=================================  ===========================================================
file, told by its content          what is read
=================================  ===========================================================
``.npz`` with ``counts``           ours: `save_routing`
``.npz`` with ``topk_idx``         per-token choices [layers, tokens, top_k], one source per file
``.npy`` [tokens, layers, top_k]   vLLM's ``routed_experts`` of a request or of many, one source
torch.save with ``logical_count``  SGLang's recorder, modes ``stat`` and ``stat_approx``: all ranks
                                   summed, one source
torch.save with ``records``        SGLang's recorder, mode ``per_token`` (``topk_ids_of_layer``) and
                                   ``per_pass`` (``global_physical_count``): one source per rank
=================================  ===========================================================
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from gimbal.core.contracts import FloatArray, IntArray, RoutingCounts
from gimbal.core.errors import InputError
from gimbal.core.files import structured, writing
from gimbal.core.json_text import parse_json, to_json
from gimbal.core.numbers import MOST_EXPERTS, MOST_RANKS, whole
from gimbal.core.placement.problem import validate_counts
from gimbal.workloads.arrays import kind_of, read_npy, read_npz
from gimbal.workloads.torch_archive import load_tensors


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
    """Writes the format that `read_routing` and ``gimbal place --routing`` read.

    Raises InputError for a file that cannot be written.
    """
    with writing(path), path.open("wb") as file:
        write_routing(file, routing)


def write_routing(file: IO[bytes], routing: RoutingFile) -> None:
    """`save_routing` into an open file."""
    arrays = {n: getattr(routing, n) for n in _OPTIONAL if getattr(routing, n) is not None}
    np.savez_compressed(
        file,
        counts=routing.counts,
        steps=np.asarray(routing.steps),
        metadata=np.asarray(to_json(routing.metadata)),
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
    kind = kind_of(path)
    if kind == "npz":
        recording = _from_npz(path, read_npz(path), experts)
    elif kind == "npy":
        recording = _from_vllm(path, read_npy(path), experts)
    else:
        recording = _from_sglang(path, load_tensors(path), experts)
    _check(path, recording)
    return recording


def _check(path: Path, recording: RoutingFile) -> None:
    """Raises InputError that names the first array and index that cannot be."""
    counts = recording.counts
    validate_counts(counts, f"{path}: counts")
    _, layers, experts = counts.shape
    whole(experts, f"{path}: experts of counts: ", 1, MOST_EXPERTS)
    for name in ("active", "decode"):
        array = getattr(recording, name)
        if array is None:
            continue
        if array.shape != counts.shape:
            raise InputError(f"{path}: {name}: shape {array.shape}, counts have {counts.shape}")
        validate_counts(array, f"{path}: {name}")
    placement = recording.physical_to_logical
    if placement is not None and (
        placement.ndim != 2
        or len(placement) != layers
        or not placement.size
        or not np.issubdtype(placement.dtype, np.integer)
        or not -1 <= placement.min() <= placement.max() < experts
    ):
        raise InputError(
            f"{path}: physical_to_logical: expected experts from -1 to {experts - 1} as integers "
            f"[layer, slot] of {layers} layer(s)"
        )


def _numbers(path: Path, name: str, array: np.ndarray) -> FloatArray:
    """`array` as float64; raises InputError when it holds no real numbers."""
    if array.dtype.kind not in "iufb":
        raise InputError(f"{path}: {name}: expected numbers, got {array.dtype}")
    return np.asarray(array, dtype=np.float64)


def _from_npz(path: Path, data: dict[str, np.ndarray], experts: int | None) -> RoutingFile:
    if "counts" in data:
        optional: dict[str, Any] = {
            n: _numbers(path, n, data[n]) for n in ("active", "decode") if n in data
        }
        if "physical_to_logical" in data:
            optional["physical_to_logical"] = data["physical_to_logical"]
        return RoutingFile(
            _numbers(path, "counts", data["counts"]),
            steps=whole(data.get("steps", np.asarray(1)).tolist(), f"{path}: steps=", 1),
            metadata=_metadata(path, data),
            **optional,
        )
    if "topk_idx" in data:
        counts = count_choices(data["topk_idx"], experts, str(path))
        steps = max(1, data["seq_len"].size) if "seq_len" in data else 1
        return RoutingFile(counts[None], steps=steps, metadata={"source": path.stem})
    raise InputError(f"{path}: holds neither counts nor topk_idx, but {', '.join(sorted(data))}")


def _metadata(path: Path, data: dict[str, np.ndarray]) -> dict[str, Any]:
    if "metadata" not in data:
        return {}
    metadata = parse_json(str(data["metadata"]), f"{path}: metadata")
    if not isinstance(metadata, dict):
        raise InputError(f"{path}: metadata: expected a JSON object")
    for name in ("ranks", "ranks_per_source"):
        if metadata.get(name) is not None:
            metadata[name] = whole(metadata[name], f"{path}: metadata.{name}=", 1, MOST_RANKS)
    return metadata


def _from_vllm(path: Path, choices: np.ndarray, experts: int | None) -> RoutingFile:
    if choices.ndim != 3:
        raise InputError(f"{path}: expected [tokens, layers, top_k], got {choices.shape}")
    counts = count_choices(choices.transpose(1, 0, 2), experts, str(path))
    return RoutingFile(counts[None], metadata={"source": path.stem})


def _from_sglang(path: Path, data: Any, experts: int | None) -> RoutingFile:
    if not isinstance(data, dict):
        raise InputError(f"{path}: expected a dictionary, got {type(data).__name__}")
    if "logical_count" in data:
        counts = _numbers(path, "logical_count", np.asarray(data["logical_count"]))
        if counts.ndim not in (2, 3) or not counts.size:
            raise InputError(f"{path}: logical_count: unexpected shape {counts.shape}")
        passes = counts.reshape(-1, *counts.shape[-2:])
        used = max(1, int(passes.any(axis=(1, 2)).sum()))
        return RoutingFile(passes.sum(axis=0)[None], steps=used, metadata={"source": path.stem})
    if not data.get("records"):
        raise InputError(f"{path}: holds neither logical_count nor records")
    with structured(path):
        return _from_passes(path, data, experts)


def _from_passes(path: Path, data: dict[str, Any], experts: int | None) -> RoutingFile:
    """Modes ``per_pass`` and ``per_token``; what is missing in `data` raises whatever it does."""
    # Recorded ids are physical: SGLang records after it has chosen a replica.
    table = np.asarray(data["last_physical_to_logical_map"])
    logical = experts or int(table.max()) + 1
    whole(logical, f"{path}: experts of last_physical_to_logical_map: ", 1, MOST_EXPERTS)
    by_rank: dict[int, FloatArray] = {}
    passes_of: dict[int, int] = {}
    for record in data["records"]:
        rank = whole(record["rank"], f"{path}: rank=", 0, MOST_RANKS)
        if "topk_ids_of_layer" in record:
            counts = _chosen(path, np.asarray(record["topk_ids_of_layer"]), table, logical)
        else:
            physical = np.asarray(record["global_physical_count"])
            counts = _summed(
                path, _numbers(path, "global_physical_count", physical), table, logical
            )
        by_rank[rank] = by_rank.get(rank, 0.0) + counts
        passes_of[rank] = passes_of.get(rank, 0) + 1
    stacked = np.stack([by_rank[rank] for rank in sorted(by_rank)])
    return RoutingFile(stacked, steps=max(passes_of.values()), metadata={"source": path.stem})


def _chosen(path: Path, ids: np.ndarray, table: np.ndarray, logical: int) -> FloatArray:
    """[layers, logical] from physical `ids` [layers, tokens, top_k]."""
    if ids.size and ids.max() >= table.shape[1]:
        raise InputError(
            f"{path}: topk_ids_of_layer: id {ids.max()}, but last_physical_to_logical_map has "
            f"{table.shape[1]} experts (a fused shared expert? record with "
            "--disable-shared-experts-fusion)"
        )
    chosen = np.full(ids.shape, -1, dtype=np.int64)
    for layer in range(len(ids)):
        known = ids[layer] >= 0
        chosen[layer][known] = table[layer][ids[layer][known]]
    return count_choices(chosen, logical, str(path))


def _summed(path: Path, counts: FloatArray, table: np.ndarray, logical: int) -> FloatArray:
    """[layers, logical] from `counts` [layers, physical experts]."""
    if counts.shape != table.shape or not -1 <= table.min() <= table.max() < logical:
        raise InputError(
            f"{path}: global_physical_count {counts.shape} does not fit "
            f"last_physical_to_logical_map {table.shape} of {logical} experts"
        )
    rows = zip(table + 1, counts, strict=True)  # -1, an empty slot, holds nobody's
    return np.stack([np.bincount(to, of, logical + 1)[1:] for to, of in rows])


def count_choices(choices: np.ndarray, experts: int | None, where: str) -> FloatArray:
    """[layers, experts] from `choices` [layers, tokens, top_k]; negative entries are padding.

    Raises InputError when a choice is not below `experts`.
    """
    if choices.ndim != 3 or not np.issubdtype(choices.dtype, np.integer):
        raise InputError(f"{where}: choices: expected integers [layers, tokens, top_k]")
    highest = int(choices.max()) if choices.size else -1
    width = experts or highest + 1
    if highest >= width:
        raise InputError(f"{where}: expert {highest} is chosen, but there are {width}")
    if highest < 0:
        raise InputError(f"{where}: no expert is chosen")
    whole(width, f"{where}: experts chosen among: ", 1, MOST_EXPERTS)
    flat = choices.reshape(len(choices), -1).astype(np.int64)
    return np.stack([np.bincount(row[row >= 0], minlength=width) for row in flat]).astype(float)
