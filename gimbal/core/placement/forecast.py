"""From past windows to the next one: how much popularity regresses, and how uncertain it stays.

A placement serves the window after the one it was planned on. Hot experts cool down and cold ones
warm up, the hottest most of all, so an expert's expected share depends on its rank in its layer.
Both that regression and the spread around it are learned from pairs of successive windows, pooled
over layers and windows (empirical Bayes), with nothing assumed about the drift but that it goes on
as it did: for the expert of rank k in a layer,

    factor[k] = sqrt(mean next share of rank k / mean share of rank k)   (mean forced to fall)
    spread[k] = standard deviation of the next share around its expectation

The square root goes half the way to the mean: the slowest rank is made by the hot experts that
stay hot, not by the average one. Measured on synthetic drift at 4 to 256 ranks, half the way gave
a better next window than none and than all of it in most rows, and was never the worst.

Pure and deterministic: a state in, a new state out; every rank that sees the same windows has the
same state.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gimbal.core.contracts import FloatArray

MEMORY = 0.8
"""Weight of what was learned before when a new pair of windows comes in."""


@dataclass(frozen=True, slots=True)
class ForecastState:
    """What has been learned; shares are relative to the layer's mean expert.

    Attributes:
        previous: [layers, experts] shares of the last window.
        weight: decayed number of window pairs seen; 0 before the second window.
        next_share: [experts] decayed sum, by rank, of the mean share one window later.
        share: [experts] the same for the window itself.
        squares: [experts] decayed sum of mean squared deviations from the regression.
    """

    previous: FloatArray
    weight: float
    next_share: FloatArray
    share: FloatArray
    squares: FloatArray


@dataclass(frozen=True, slots=True)
class Forecast:
    """Attributes:
    factor: [layers, experts] pairs to plan for, over pairs of the window.
    spread: [layers, experts] standard deviation of next pairs, or None before two windows.
    """

    factor: FloatArray
    spread: FloatArray | None


def observe(state: ForecastState | None, total: FloatArray) -> ForecastState:
    """Learns from one more window; `total` is [layers, experts] pairs over all sources.

    A window of another shape starts anew (another model or another set of layers).
    """
    mean = np.maximum(total.mean(axis=1, keepdims=True), 1e-300)
    share = total / mean
    experts = total.shape[1]
    if state is None or state.previous.shape != total.shape:
        return ForecastState(share, 0.0, *(np.zeros(experts) for _ in range(3)))
    order = np.argsort(-state.previous, axis=1, kind="stable")
    before = np.take_along_axis(state.previous, order, axis=1)
    after = np.take_along_axis(share, order, axis=1)
    before_mean, after_mean = before.mean(axis=0), after.mean(axis=0)
    expected = before * (after_mean / np.maximum(before_mean, 1e-300))
    return ForecastState(
        previous=share,
        weight=MEMORY * state.weight + 1.0,
        next_share=MEMORY * state.next_share + after_mean,
        share=MEMORY * state.share + before_mean,
        squares=MEMORY * state.squares + ((after - expected) ** 2).mean(axis=0),
    )


def predict(state: ForecastState, total: FloatArray) -> Forecast:
    """Forecast of the window after `total`, which `state` has already observed."""
    if state.weight == 0.0:
        return Forecast(np.ones_like(total), None)
    # Of a place that nobody held in a window of few tokens nothing is known.
    known = state.share > 0.0
    grown = np.divide(
        falling(state.next_share), state.share, out=np.ones_like(state.share), where=known
    )
    factor = np.sqrt(grown)
    spread = np.sqrt(falling(state.squares / state.weight))
    order = np.argsort(-total, axis=1, kind="stable")
    by_expert = np.empty(total.shape, dtype=np.intp)
    np.put_along_axis(by_expert, order, np.arange(total.shape[1])[None, :], axis=1)
    mean = total.mean(axis=1, keepdims=True)
    return Forecast(factor[by_expert], spread[by_expert] * mean)


def falling(values: FloatArray) -> FloatArray:
    """Closest non-increasing sequence in least squares (pool adjacent violators)."""
    levels: list[float] = []
    sizes: list[int] = []
    for value in values.tolist():
        levels.append(value)
        sizes.append(1)
        while len(levels) > 1 and levels[-2] < levels[-1]:
            level, size = levels.pop(), sizes.pop()
            pooled = levels[-1] * sizes[-1] + level * size
            sizes[-1] += size
            levels[-1] = pooled / sizes[-1]
    return np.repeat(levels, sizes)
