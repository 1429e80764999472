"""Arrival processes with unit mean gap, scaled to a rate.

Poisson has exponential gaps (CV 1). Gamma has shape 1/CV**2, so CV > 1 is burstier and CV < 1
smoother than Poisson; the same parametrization as BurstGPT's generator (arXiv 2401.17644).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from gimbal.core.errors import InputError
from gimbal.core.numbers import real

PROCESSES = ("trace", "poisson", "gamma")
LEAST_RPS = 1e-6
"""A request in eleven days."""
LEAST_CV, MOST_CV = 1e-3, 1e3
"""Beyond these gamma gaps are all alike, or all but one are 0."""


def arrival_times_s(
    process: str, count: int, rate_rps: float, cv: float, rng: np.random.Generator
) -> npt.NDArray[np.float64]:
    """[count] ascending times from 0 with mean gap 1/rate_rps; raises InputError on bad values."""
    rate_rps = real(rate_rps, "arrival rate ", LEAST_RPS)
    if process == "poisson":
        cv = 1.0
    elif process != "gamma":
        raise InputError(f"unknown arrival process {process!r} (choose from gamma, poisson)")
    cv = real(cv, "coefficient of variation ", LEAST_CV, MOST_CV)
    shape = 1.0 / cv**2
    gaps = rng.gamma(shape, 1.0 / (shape * rate_rps), size=max(count - 1, 0))
    return np.concatenate(([0.0], np.cumsum(gaps)))[:count]
