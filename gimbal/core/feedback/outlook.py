"""What placement may expect of the next windows, from the rows of the last two.

Dispatch decides which differences between sources come back: where it spreads all work over all
engines they are chance, under affinity or sessions they stay. Neither is announced; both show in
how much of one window's rows is still there in the next. How far the planner's own gains can be
believed shows in what its rearrangements have earned.
"""

from __future__ import annotations

import numpy as np

from gimbal.core.contracts import FloatArray, RoutingCounts
from gimbal.core.feedback.sources import persistence, shrunk, slope

MOST_WINDOWS = 8
"""Longer horizons are not trusted, however steady the mix."""

MEMORY = 0.5
"""Weight of a rearrangement's gain when the next one's is known."""


class Outlook:
    """Learns from successive windows; the same windows give the same outlook on every rank.

    Attributes:
        kept: share of the differences between sources that lasts one window; 0 before the second.
        lasting: windows for which today's routing is still there, 1 to `MOST_WINDOWS`.
        trust: realized over predicted gain of the rearrangements so far, 0 to 1; 0 before the
            first one has been realized.
    """

    def __init__(self) -> None:
        self.kept = 0.0
        self.lasting = 1.0
        self.trust = 0.0
        self._before: FloatArray | None = None
        self._predicted_us = self._realized_us = 0.0

    @property
    def windows(self) -> float:
        """Windows over which a gain may be expected to be earned, 1 to `MOST_WINDOWS`."""
        return self.earned(self.lasting)

    def earned(self, windows: float) -> float:
        """`windows` as far as gains predicted before came true, at least 1.

        One is what is expected without feedback; a stall of a second must not be spent on an
        unproven prediction of more.
        """
        return max(1.0, self.trust * windows)

    def realized(self, predicted_us: float, realized_us: float) -> None:
        """Takes the gains per step of one rearrangement: as predicted, and as it turned out."""
        self._predicted_us = MEMORY * self._predicted_us + predicted_us
        self._realized_us = MEMORY * self._realized_us + realized_us
        if self._predicted_us > 0.0:
            self.trust = float(np.clip(self._realized_us / self._predicted_us, 0.0, 1.0))

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
            self.kept, self.lasting = 0.0, 1.0
        else:
            self.kept = _fresh(persistence(before, rows), overlap)
            left = _fresh(slope(_uneven(before), _uneven(rows)), overlap)
            self.lasting = lasting_windows(left)
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
    """The slope on steps the earlier window did not hold: ``m = o + (1 - o) f``."""
    return float(np.clip((measured - overlap) / (1.0 - overlap), 0.0, 1.0))


def _uneven(rows: FloatArray) -> FloatArray:
    """[sources, layers, experts] by how much each row differs from an even spread of its own:
    what a placement can earn by, be it hot experts or sources that differ."""
    return np.asarray(rows - rows.mean(axis=2, keepdims=True))
