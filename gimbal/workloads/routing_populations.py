"""Synthetic routing: expert popularity that is skewed, drifts, and differs between sources.

Each layer has one popularity order that all sources share and one per source. An order follows
the sort of latent normal scores; from window to window the scores move as an AR(1) process, so
hot experts cool down and cold ones rise at the pace `drift_correlation` sets. Popularity is Zipf
in the order: the k-th expert draws traffic in proportion to ``k ** -zipf_exponent``. A source
mixes its own order (weight `source_share`) with the shared one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from gimbal.core.contracts import FloatArray
from gimbal.core.errors import InputError


@dataclass(frozen=True, slots=True)
class RoutingPopulation:
    """Parameters of one synthetic population of routed tokens.

    Attributes:
        layers, experts, sources: shape of every window, [sources, layers, experts].
        zipf_exponent: skew of popularity; 0 is uniform.
        drift_correlation: correlation of an expert's latent score between windows; 1 is no drift.
        source_share: share of a source's traffic that follows its own popularity order.
        tokens_per_source: tokens one source routes per window.
        top_k: experts a token is sent to; a window holds tokens_per_source * top_k pairs per
            source and layer.
        seed: seed of the whole sequence of windows.
    """

    layers: int
    experts: int
    sources: int
    zipf_exponent: float = 0.8
    drift_correlation: float = 0.97
    source_share: float = 0.7
    tokens_per_source: int = 16_384
    top_k: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("layers", "experts", "sources", "tokens_per_source", "top_k"):
            if getattr(self, name) < 1:
                raise InputError(f"routing population: {name} must be at least 1")
        for name in ("drift_correlation", "source_share"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise InputError(f"routing population: {name} must lie in [0, 1]")
        if self.zipf_exponent < 0.0:
            raise InputError("routing population: zipf_exponent must not be negative")


def _popularity(scores: FloatArray, by_rank: FloatArray) -> FloatArray:
    """Popularity of each expert: `by_rank` handed out in descending order of `scores`."""
    order = np.argsort(-scores, axis=-1, kind="stable")
    popularity = np.empty_like(scores)
    np.put_along_axis(popularity, order, np.broadcast_to(by_rank, scores.shape), axis=-1)
    return popularity


def windows(population: RoutingPopulation) -> Iterator[FloatArray]:
    """Yields windows of counts [sources, layers, experts] for ever, the same for the same seed.

    Pairs are drawn multinomially, so a window carries sampling noise even without drift.
    """
    p = population
    rng = np.random.default_rng(p.seed)
    by_rank = np.arange(1, p.experts + 1, dtype=np.float64) ** -p.zipf_exponent
    by_rank /= by_rank.sum()
    shared = rng.standard_normal((p.layers, p.experts))
    own = rng.standard_normal((p.sources, p.layers, p.experts))
    innovation = np.sqrt(1.0 - p.drift_correlation**2)
    while True:
        mix = p.source_share * _popularity(own, by_rank)
        mix += (1.0 - p.source_share) * _popularity(shared, by_rank)
        mix /= mix.sum(axis=-1, keepdims=True)
        yield rng.multinomial(p.tokens_per_source * p.top_k, mix).astype(np.float64)
        shared = p.drift_correlation * shared + innovation * rng.standard_normal(shared.shape)
        own = p.drift_correlation * own + innovation * rng.standard_normal(own.shape)
