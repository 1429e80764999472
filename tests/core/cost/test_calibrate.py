"""Calibration recovers a known machine from its steps."""

import numpy as np
import pytest

from gimbal.core.cost.calibrate import FEATURES, StepSample, fit_steps, profile_from_fit
from gimbal.core.cost.profile import Layout, ModelShape
from gimbal.core.cost.step import BatchShape, step_time

TRUE = {
    "base": 5000.0,
    "rank_token": 40.0,
    "prefill_pair": 0.02,
    "decode_kv_token": 0.3,
    "request": 60.0,
    "group_token": 25.0,
}
SHAPE = ModelShape(4, 32, 4, 256, 200_000, 1024)


def samples(count=600, noise=0.03, seed=0):
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        own, other = rng.integers(1, 512, 2) * (rng.random(2) < 0.7) + 1
        decodes = float(rng.integers(0, 40))
        features = (
            1.0,
            float(max(own, other)) + decodes,
            float(own * rng.integers(0, 2000)),
            decodes * float(rng.integers(10, 800)),
            decodes,
            float(own + other) + decodes,
        )
        y = sum(TRUE[n] * v for n, v in zip(FEATURES, features, strict=True))
        rows.append(StepSample(y * (1 + noise * rng.standard_normal()), *features[1:]))
    return rows


def test_coefficients_come_back():
    fit = fit_steps(samples())
    for name, value in TRUE.items():
        assert fit.coefficients_us[name] == pytest.approx(value, rel=0.25), name
    assert fit.error < 0.04


def test_stalled_steps_do_not_bend_the_fit():
    rows = samples()
    stalled = [
        StepSample(s.duration_us * 50, *s.features()[1:]) if i % 200 == 3 else s
        for i, s in enumerate(rows)
    ]
    assert fit_steps(stalled).coefficients_us["base"] == pytest.approx(TRUE["base"], rel=0.25)


def test_the_profile_predicts_what_was_fitted():
    fit = fit_steps(samples(noise=0.0))
    profile = profile_from_fit(fit, "x", "y", SHAPE, Layout(2), 10_000)
    batch = BatchShape(
        *(np.array(v, float) for v in ((300, 20), (0, 4000), (9e4, 0), (0, 0), (0, 20)))
    )
    pairs = np.full((4, 2), 320 * 4 / 2)
    got = step_time(profile, batch, np.zeros((4, 2)), pairs).total_us
    c = fit.coefficients_us
    # Dense and attention are the slowest rank's together, not each one's own maximum.
    slowest = max(
        300 * c["rank_token"] + 9e4 * c["prefill_pair"],
        20 * c["rank_token"] + 4000 * c["decode_kv_token"],
    )
    want = c["base"] + slowest + 20 * c["request"] + 320 * c["group_token"]
    assert got == pytest.approx(want, rel=1e-6)


def test_too_few_steps_are_refused():
    with pytest.raises(ValueError, match="10 steps are too few"):
        fit_steps(samples(10))
