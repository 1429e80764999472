"""What placement may expect of the next windows, from the rows of the last two.

Dispatch decides which differences between sources come back: where it spreads all work over all
engines they are chance, under affinity or sessions they stay. Neither is announced; both show in
how much of one window's rows is still there in the next.
"""

from __future__ import annotations

import numpy as np

from gimbal.core.contracts import FloatArray, RoutingCounts
from gimbal.core.feedback.sources import persistence, shrunk

MOST_WINDOWS = 8
"""Longer horizons are not trusted, however steady the mix."""


class Outlook:
    """Learns from successive windows; the same windows give the same outlook on every rank.

    Attributes:
        kept: share of the differences between sources that lasts one window; 0 before the second.
        windows: windows over which today's routing may be expected to earn, 1 to `MOST_WINDOWS`.
    """

    def __init__(self) -> None:
        self.kept = 0.0
        self.windows = 1.0
        self._before: FloatArray | None = None

    def observe(self, counts: RoutingCounts, overlap: float = 0.0) -> RoutingCounts:
        """Takes one window; returns the rows to plan for.

        Args:
            counts: rows [source, layer, expert] of the window.
            overlap: share of its weight in steps that the window before also held, 0 to 1. What
                both hold in common says nothing about the future.
        """
        rows, before = counts.counts, self._before
        self._before = rows
        if before is None or before.shape != rows.shape or overlap >= 1.0:
            self.kept, self.windows = 0.0, 1.0
        else:
            self.kept = _fresh(persistence(before, rows), overlap)
            lasting = _fresh(_regression(_uneven(before), _uneven(rows)), overlap)
            self.windows = lasting_windows(lasting)
        return shrunk(counts, self.kept)


def window_overlap(steps_between: int, window_steps: int, half_life_steps: float) -> float:
    """Share of a decayed window's weight in steps that the window before also held.

    Args:
        steps_between: steps from one window's end to the next one's.
        window_steps: steps a window reaches back.
        half_life_steps: a step's weight halves every so many steps.
    """
    if steps_between >= window_steps:
        return 0.0
    shared, whole = (0.5 ** (n / half_life_steps) for n in (steps_between, window_steps))
    return float((shared - whole) / (1.0 - whole))


def lasting_windows(lasting: float, most: int = MOST_WINDOWS) -> float:
    """Windows' worth of a gain of which a share `lasting` is left after each window.

    ``1 + l + l^2 + ...`` over `most` windows: 1 when nothing lasts, `most` when everything does.
    """
    return float(sum(lasting**k for k in range(most)))


def _fresh(measured: float, overlap: float) -> float:
    """The regression on steps the earlier window did not hold: ``m = o + (1 - o) f``."""
    return float(np.clip((measured - overlap) / (1.0 - overlap), 0.0, 1.0))


def _uneven(rows: FloatArray) -> FloatArray:
    """[sources, layers, experts] by how much each row differs from an even spread of its own:
    what a placement can earn by, be it hot experts or sources that differ."""
    return np.asarray(rows - rows.mean(axis=2, keepdims=True))


def _regression(before: FloatArray, now: FloatArray) -> float:
    """Slope of `now` on `before`, clipped to 0..1: noise in the earlier window lowers it."""
    squares = float((before * before).sum())
    return float(np.clip((before * now).sum() / squares, 0.0, 1.0)) if squares > 0 else 0.0
