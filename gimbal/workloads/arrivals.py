"""Arrival processes with unit mean gap, scaled to a rate.

Poisson has exponential gaps (CV 1). Gamma has shape 1/CV**2, so CV > 1 is burstier and CV < 1
smoother than Poisson; the same parametrization as BurstGPT's generator (arXiv 2401.17644).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from gimbal.core.errors import InputError

PROCESSES = ("trace", "poisson", "gamma")


def arrival_times_s(
    process: str, count: int, rate_rps: float, cv: float, rng: np.random.Generator
) -> npt.NDArray[np.float64]:
    """[count] ascending times from 0 with mean gap 1/rate_rps; raises InputError on bad values."""
    if not rate_rps > 0:
        raise InputError(f"arrival rate {rate_rps!r}: expected a number > 0")
    if process == "poisson":
        cv = 1.0
    elif process != "gamma":
        raise InputError(f"unknown arrival process {process!r} (choose from gamma, poisson)")
    if not cv > 0:
        raise InputError(f"coefficient of variation {cv!r}: expected a number > 0")
    shape = 1.0 / cv**2
    gaps = rng.gamma(shape, 1.0 / (shape * rate_rps), size=max(count - 1, 0))
    return np.concatenate(([0.0], np.cumsum(gaps)))[:count]
