"""Damping of a signal that steers what it measures, derived from its delay.

The loop: dispatch sends work by pressure, work makes load, load is measured as pressure, and the
measurement reaches dispatch `delay` updates later. Around its resting point, with y the filtered
pressure, ``y[k+1] = y[k] + g (x[k] - y[k])`` the filter of gain g and ``x[k] = w - K y[k-d]`` the
pressure that work dispatched d updates ago causes (K: the loop gain, microseconds of pressure
answered per microsecond published), the loop is

    y[k+1] - (1 - g) y[k] + g K y[k-d] = g w.

Stability. (a) For K < 1 it is stable for every g in (0, 1] and every delay: (1 - g) + g K < 1, so
the characteristic polynomial's largest coefficient dominates the sum of the others. (b) For any K
it is stable if ``g K < 2 sin(pi / (2 (2 D + 1)))`` with D = max(d, 1). For g -> 0 and d >= 1 this
is the exact bound of the delayed integrator (Levin and May, Theor. Popul. Biol. 9, 1976). For g > 0
the exact bound b(a), a = 1 - g (Kuruklis, J. Math. Anal. Appl. 188, 1994), is 1 at a = 0 and, for
d >= 1, falls to that value at a = 1; for d = 0 it is 1 + a, at least 1, hence D. The tests check
(a) and (b) against the roots of the polynomial.

`gain` keeps g K a factor `margin` below that bound: with 2 the loop bears twice the loop gain it
was designed for, or about twice the delay. White measurement noise of variance v leaves the filter
with g / (2 - g) v.
"""

from __future__ import annotations

import math

import numpy as np

from gimbal.core.contracts import FloatArray

MARGIN = 2.0


def gain_limit(delay_updates: int) -> float:
    """A g * K that is stable at a delay of so many updates, see the module; at most 1."""
    return 2.0 * math.sin(math.pi / (2.0 * (2 * max(delay_updates, 1) + 1)))


def gain(loop_gain: float, delay_updates: int, margin: float = MARGIN) -> float:
    """Filter gain in (0, 1] that keeps the loop stable by `margin`.

    Args:
        loop_gain: K above; below 1 / margin no damping is needed for stability and 1 is returned.
        delay_updates: updates from a decision to the first published value that shows its effect.
        margin: factor kept between the loop and its stability limit.

    Raises ValueError for a negative loop gain, a negative delay or a margin below 1.
    """
    if not loop_gain >= 0 or delay_updates < 0 or not margin >= 1:
        raise ValueError(f"loop gain {loop_gain}, delay {delay_updates}, margin {margin}")
    if loop_gain * margin < 1.0:
        return 1.0
    return min(1.0, gain_limit(delay_updates) / (margin * loop_gain))


def delay_updates(signal_age_us: float, response_us: float, period_us: float) -> int:
    """Updates from a decision to a published value that shows it, rounded up.

    Args:
        signal_age_us: from the measurement to the moment dispatch reads it.
        response_us: from a dispatch decision to its work being in a step.
        period_us: between updates. A window is averaged over one, which adds half of it.
    """
    return math.ceil((signal_age_us + response_us) / period_us + 0.5)


class DampedSignal:
    """A first-order filter over the engines' pressure; see the module for its gain.

    Args:
        engines: length of the signal.
        filter_gain: g in (0, 1]; 1 passes values through.
    """

    def __init__(self, engines: int, filter_gain: float) -> None:
        if not 0 < filter_gain <= 1:
            raise ValueError(f"filter gain {filter_gain}: expected a number in (0, 1]")
        self.gain = filter_gain
        self.value: FloatArray = np.zeros(engines)

    def update(self, measured: FloatArray) -> FloatArray:
        """Takes one measurement, [engines]; returns the damped value."""
        self.value = self.value + self.gain * (measured - self.value)
        return self.value
