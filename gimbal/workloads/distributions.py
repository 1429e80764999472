"""The five prompt-length distributions of the Gimbal paper, over real lengths.

The paper names them (random, central, descending, two-end, average) and builds them from
BurstGPT; it gives no formulas, so these are ours. Each draws real (prompt, output) pairs with
weights that depend on the prompt's length alone, so outputs keep their real relation to prompts.

Let l be a prompt's length and x = (ln l - ln lo) / (ln hi - ln lo), clipped to [0, 1], where lo
and hi are the 1st and 99th percentile of the pool. Let f(x) be the pool's density over x,
estimated by 32 equal bins (a bin without a row gets no weight). Row weights are w = g(x) / f(x)
with the target density g over x:

- ``random``: g = f, i.e. the real distribution, unchanged.
- ``central``: normal around the middle, g = exp(-(x - 0.5)**2 / (2 * 0.15**2)).
- ``descending``: g = exp(-3 x): many short, few long.
- ``two-end``: two narrow humps, g = exp(-(x - 0.1)**2 / (2 * 0.07**2))
  + exp(-(x - 0.9)**2 / (2 * 0.07**2)).
- ``average``: g = 1: every length octave as frequent as the next.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from gimbal.core.errors import InputError, nearest

DISTRIBUTIONS = ("random", "central", "descending", "two-end", "average")
BINS = 32

FloatArray = npt.NDArray[np.float64]


def relative_length(prompt_tokens: npt.NDArray[np.int64]) -> FloatArray:
    """[requests] log-scaled position of each length between the pool's P1 and P99, in [0, 1]."""
    logs = np.log(np.maximum(prompt_tokens, 1))
    low, high = np.percentile(logs, [1, 99])
    if high <= low:
        return np.full(len(logs), 0.5)
    position: FloatArray = np.clip((logs - low) / (high - low), 0.0, 1.0)
    return position


def target_density(name: str, x: FloatArray) -> FloatArray:
    """Unnormalized g(x); raises InputError for an unknown name ("random" has no g)."""
    density: FloatArray
    if name == "central":
        density = np.exp(-((x - 0.5) ** 2) / (2 * 0.15**2))
    elif name == "descending":
        density = np.exp(-3.0 * x)
    elif name == "two-end":
        width = 2 * 0.07**2
        density = np.exp(-((x - 0.1) ** 2) / width) + np.exp(-((x - 0.9) ** 2) / width)
    elif name == "average":
        density = np.ones_like(x)
    else:
        raise InputError(f"unknown length distribution {name!r}{nearest(name, DISTRIBUTIONS)}")
    return density


def weights(name: str, prompt_tokens: npt.NDArray[np.int64]) -> FloatArray:
    """[requests] probability of drawing each row of the pool; sums to 1."""
    count = len(prompt_tokens)
    if name == "random":
        return np.full(count, 1.0 / count)
    x = relative_length(prompt_tokens)
    bins = np.minimum((x * BINS).astype(np.int64), BINS - 1)
    density = np.bincount(bins, minlength=BINS).astype(np.float64)
    centres = (np.arange(BINS) + 0.5) / BINS
    row: FloatArray = target_density(name, centres)[bins] / density[bins]
    row /= row.sum()
    return row


def draw(
    name: str, prompt_tokens: npt.NDArray[np.int64], count: int, rng: np.random.Generator
) -> npt.NDArray[np.int64]:
    """[count] row indices into the pool, with replacement."""
    return rng.choice(len(prompt_tokens), size=count, p=weights(name, prompt_tokens))
