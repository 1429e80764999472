"""Student's t: how far a mean over few turns may lie from the true one."""

from __future__ import annotations

import math
from functools import lru_cache

MOST_FREEDOM = 1000
"""Beyond it the normal distribution is as good."""
CONFIDENCE = 0.95


def within(t: float, freedom: int) -> float:
    """P(|T| <= t) for `freedom` degrees of freedom.

    The finite series of Abramowitz and Stegun, 26.7.3 and 26.7.4.
    """
    freedom = min(freedom, MOST_FREEDOM)
    angle = math.atan2(t, math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term = cosine if odd else 1.0
    total = 0.0
    for k in range(1 + odd, freedom, 2):
        total += term
        term *= cosine * cosine * k / (k + 1)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


@lru_cache(maxsize=256)
def quantile(freedom: int, confidence: float = CONFIDENCE) -> float:
    """The t within which a share of `confidence` lies."""
    low, high = 0.0, 1.0
    while within(high, freedom) < confidence:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if within(middle, freedom) < confidence else (low, middle)
    return high
