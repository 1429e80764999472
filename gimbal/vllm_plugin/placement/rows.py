"""Gathered rows, one per expert-parallel rank, turned into counts per source engine.

Every rank computes this from the same bytes, so all ranks agree on the result.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import numpy as np

from gimbal.core.contracts import FloatArray, RoutingCounts
from gimbal.core.errors import InputError
from gimbal.core.placement.kinds import MEAN_STEP, StepKind, step_kinds, typical_share

PLANES = 4
"""Arrays [layers, experts] of a row: vLLM's own sum, decayed pairs, decayed pairs of decodes,
decayed number of steps in which the expert was active."""
SCALARS = 4
"""Numbers behind a row's planes: decayed steps, recorded steps, the last rearrangement's stall,
decayed sum over steps of squared pairs."""

MOST_IN_ROW = 1e30
"""Far beyond a row's squares, the largest of its numbers; their own squares are still finite."""


class Sources(Enum):
    """What the rows of a group tell about who asked."""

    PER_RANK = "each rank counts tokens of its own"
    PER_ENGINE = "ranks of one engine count the same tokens"
    UNKNOWN = "every rank counts all tokens, so source-awareness is off"


@dataclass(frozen=True, slots=True)
class RankRows:
    """One model's rows of all ranks.

    Attributes:
        raw: [ranks, layers, experts] what vLLM sums, not decayed.
        pairs, decode_pairs: [ranks, layers, experts] decayed token-expert pairs.
        active_steps: [ranks, layers, experts] decayed steps that activated the expert.
        steps: [ranks] decayed steps with tokens; recorded: [ranks] rows of the window in use.
        stall_us: [ranks] what the last rearrangement took, 0 before the first. Gathered because
            planning must see the same figure on every rank.
        squares: [ranks] decayed sum over steps of a step's squared pairs, all layers together.
    """

    raw: FloatArray
    pairs: FloatArray
    decode_pairs: FloatArray
    active_steps: FloatArray
    steps: FloatArray
    recorded: FloatArray
    stall_us: FloatArray
    squares: FloatArray


def row_length(layers: int, experts: int) -> int:
    """Numbers in one rank's row of a model."""
    return PLANES * layers * experts + SCALARS


def split_rows(gathered: FloatArray, layers: int, experts: int) -> RankRows:
    """`gathered` is [ranks, row_length(layers, experts)].

    Raises InputError for a number that no count, step or time can be; every rank sees the same.
    """
    # NaN is the least and the largest of what it stands among.
    if not (gathered.min() >= 0.0 and gathered.max() <= MOST_IN_ROW):
        bad = np.argwhere(~((gathered >= 0.0) & (gathered <= MOST_IN_ROW)))[0]
        value = gathered[tuple(bad)]
        raise InputError(f"row of rank {bad[0]}, number {bad[1]}: {value:g} is no count")
    ranks = gathered.shape[0]
    planes = gathered[:, :-SCALARS].reshape(ranks, PLANES, layers, experts)
    return RankRows(*(planes[:, p] for p in range(PLANES)), *gathered[:, -SCALARS:].T)


def who_counts(layers: Iterable[Any], ranks_per_source: int) -> Sources:
    """Which tokens the ranks counted, from what vLLM does in the MoE `layers` of a model.

    A rank counts what it routes: tokens of all ranks where router logits are gathered first,
    otherwise its engine's, or its own share of those where MoE layers are sequence-parallel. Asked
    at every rearrangement, because vLLM may make a layer's kernel after it has loaded the model.
    """
    runners = [getattr(layer, "runner", layer) for layer in layers]
    if any(map(_routes_all_tokens, runners)):
        return Sources.UNKNOWN
    shared = not any(map(_is_sequence_parallel, runners))
    return Sources.PER_ENGINE if ranks_per_source > 1 and shared else Sources.PER_RANK


def _routes_all_tokens(runner: Any) -> bool:
    names = ("do_naive_dispatch_combine", "is_monolithic")
    return any(bool(getattr(runner, name, False)) for name in names)


def _is_sequence_parallel(runner: Any) -> bool:
    config = getattr(runner, "moe_config", None)
    return bool(getattr(config, "is_sequence_parallel", False))


@dataclass(frozen=True, slots=True)
class SourceCounts:
    """Counts per source engine.

    Attributes:
        routing: [sources, layers, experts] for the placer; one source when `sources` is UNKNOWN.
        decode: share of `routing.counts` that belongs to decodes, same shape.
        sources: how the rows were read.
        kinds: of step, what the window is planned for.
    """

    routing: RoutingCounts
    decode: FloatArray
    sources: Sources
    kinds: tuple[StepKind, ...] = MEAN_STEP


def per_source(rows: RankRows, ranks_per_source: int, sources: Sources) -> SourceCounts:
    """Adds ranks to engines as `sources` (`who_counts`) says, and scales to whole steps.

    Lock-step engines share their steps: the busiest rank's decayed steps are the window's.
    """
    window = max(float(rows.steps.max()), 1e-9)
    steps = max(1, round(window))
    scale = steps / window
    # Ranks of one engine take part in the same steps: the union of their activations.
    # In place: with hundreds of ranks each array is tens of megabytes.
    missed = rows.active_steps / window
    np.subtract(1.0, np.clip(missed, 0.0, 1.0, out=missed), out=missed)
    active = _folded(missed, sources, ranks_per_source, np.multiply)
    np.subtract(1.0, active, out=active)
    pairs = _folded(rows.pairs, sources, ranks_per_source, np.add) * scale
    decode_pairs = _folded(rows.decode_pairs, sources, ranks_per_source, np.add) * scale
    routing = RoutingCounts(pairs, active, steps)
    if not rows.raw.any():
        routing = replace(routing, active=None)
    decoded, counted = float(rows.decode_pairs.sum()), float(rows.pairs.sum())
    decode_share = decoded / counted if 0.0 < decoded < counted else float(decoded > 0.0)
    kinds = step_kinds(_typical(rows, sources, ranks_per_source), decode_share)
    return SourceCounts(routing, decode_pairs, sources, kinds)


def _typical(rows: RankRows, sources: Sources, ranks_per_source: int) -> float:
    """Ranks of an engine have large steps together, engines at different times."""
    steps = float(rows.steps.max())
    sums, roots = rows.pairs.sum(axis=(1, 2)), np.sqrt(rows.squares)
    if sources is Sources.UNKNOWN:
        return typical_share(float(sums[0]), float(rows.squares[0]), steps)
    sums = sums.reshape(-1, ranks_per_source).sum(axis=1)
    squares = roots.reshape(-1, ranks_per_source).sum(axis=1) ** 2
    others = (sums.sum() ** 2 - (sums**2).sum()) / max(steps, 1e-9)
    return typical_share(float(sums.sum()), float(squares.sum() + others), steps)


def _folded(
    plane: FloatArray, sources: Sources, ranks_per_source: int, combine: np.ufunc
) -> FloatArray:
    """[ranks, ...] of ranks as [sources, ...], those of one engine put together by `combine`.

    A view of `plane` where nothing is to be put together.
    """
    if sources is Sources.UNKNOWN:
        return plane[:1]
    if ranks_per_source == 1:
        return plane
    groups = plane.reshape(-1, ranks_per_source, *plane.shape[1:])
    if sources is Sources.PER_ENGINE:
        return groups[:, 0]
    return np.asarray(combine.reduce(groups, axis=1))
