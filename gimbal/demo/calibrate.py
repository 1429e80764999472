"""Gate strengths that give the demo model the routing skew of real models.

A gate logit is the sum of three parts, read from three disjoint parts of the residual stream:
the expert's popularity, its affinity to the token's domain, and its affinity to the token. With
the last at unit strength, popularity and domain strength are searched until the hottest expert of
a domain draws `skew` times the mean and two domains differ by `divergence_bits`. Top-k choice
does not change under RMSNorm (one factor for all experts), so the numbers hold in the real model.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

ROUNDS = 12
"""Alternating passes; each halves the remaining error or better."""


def selection_shares(logits: np.ndarray, top_k: int) -> np.ndarray:
    """[experts] share of selections for `logits` [tokens, experts]."""
    chosen = np.argpartition(-logits, top_k - 1, axis=1)[:, :top_k]
    counts = np.bincount(chosen.ravel(), minlength=logits.shape[1])
    return np.asarray(counts / counts.sum())


def skew_of(shares: np.ndarray) -> float:
    """Hottest expert over the mean, for one domain's [experts] shares."""
    return float(shares.max() * len(shares))


def divergence_bits(p: np.ndarray, q: np.ndarray) -> float:
    """Jensen-Shannon divergence of two distributions, in bits (base-2 logarithms, 0 to 1)."""
    middle = (p + q) / 2
    total = 0.0
    for one in (p, q):
        mask = one > 0
        total += 0.5 * float(np.sum(one[mask] * np.log2(one[mask] / middle[mask])))
    return total


def mean_divergence_bits(shares: list[np.ndarray]) -> float:
    """Mean of `divergence_bits` over all pairs."""
    pairs = [(i, j) for i in range(len(shares)) for j in range(i)]
    return float(np.mean([divergence_bits(shares[i], shares[j]) for i, j in pairs] or [0.0]))


def strengths(
    popularity: np.ndarray,
    affinity: list[np.ndarray],
    token: list[np.ndarray],
    top_k: int,
    skew: float,
    divergence: float,
) -> tuple[float, float]:
    """Searches (popularity strength, domain strength) of one layer.

    Args:
        popularity: [experts] unit-variance popularity.
        affinity: per domain [tokens, experts], the domain part of the logits at strength 1.
        token: per domain [tokens, experts], the token part.
        top_k: experts per token.
        skew: target of `skew_of`, averaged over domains.
        divergence: target of `mean_divergence_bits`.

    Returns:
        The two strengths, rounded to 1/1000 so that the weights do not depend on the last bits
        of this machine's linear algebra.
    """

    def measured(popular: float, domain: float) -> tuple[float, float]:
        shares = [
            selection_shares(popular * popularity + domain * a + t, top_k)
            for a, t in zip(affinity, token, strict=True)
        ]
        return float(np.mean([skew_of(s) for s in shares])), mean_divergence_bits(shares)

    def at_popularity(popular: float, domain: float) -> float:
        return measured(popular, domain)[1]

    def at_domain(domain: float, popular: float) -> float:
        return measured(popular, domain)[0]

    popular, domain = 0.5, 0.5
    for _ in range(ROUNDS):
        domain = _solve(partial(at_popularity, popular), divergence)
        popular = _solve(partial(at_domain, domain), skew)
    return round(popular, 3), round(domain, 3)


def _solve(
    f: Callable[[float], float], target: float, low: float = 0.0, high: float = 6.0
) -> float:
    """Bisects an increasing `f` on [low, high]; returns an end when the target lies outside."""
    if f(low) >= target:
        return low
    for _ in range(12):
        middle = (low + high) / 2
        if f(middle) < target:
            low = middle
        else:
            high = middle
    return (low + high) / 2
