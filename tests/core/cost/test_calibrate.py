"""Calibration recovers a known machine from its steps."""

import dataclasses

import numpy as np
import pytest

from gimbal.core.cost.calibrate import (
    FEATURES,
    StepSample,
    active_experts,
    fit_steps,
    profile_from_fit,
)
from gimbal.core.cost.profile import Layout, ModelShape
from gimbal.core.cost.step import BatchShape, step_time

TRUE = {
    "base": 5000.0,
    "rank_token": 40.0,
    "prefill_pair": 0.02,
    "decode_kv_token": 0.3,
    "request": 60.0,
    "group_request": 150.0,
    "group_token": 25.0,
    "active_expert": 500.0,
    "prefill_step": 4000.0,
}
SHAPE = ModelShape(4, 32, 4, 256, 200_000, 1024)


def samples(count=900, noise=0.03, seed=0):
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        own, other = rng.integers(1, 512, 2) * (rng.random(2) < 0.4)
        decodes, others = (float(d) for d in rng.integers(0, 40, 2))
        sample = StepSample(
            time_s=float(i),
            duration_us=0.0,
            rank_tokens=max(own + decodes, other + others, 1.0),
            prefill_pairs=float(own * rng.integers(0, 2000)),
            decode_kv_tokens=decodes * float(rng.integers(10, 800)),
            requests=max(decodes, others),
            group_requests=decodes + others,
            group_tokens=max(own + other + decodes + others, 2.0),
            prefill=bool(own + other),
        )
        y = sum(TRUE[n] * v for n, v in zip(FEATURES, sample.features(SHAPE, 2), strict=True))
        duration_us = float(y * (1 + noise * rng.standard_normal()))
        rows.append(dataclasses.replace(sample, duration_us=duration_us))
    return rows


def test_coefficients_come_back():
    fit = fit_steps(samples(noise=0.01), SHAPE, 2)
    for name, value in TRUE.items():
        assert fit.coefficients_us[name] == pytest.approx(value, rel=0.25), name
    assert fit.error < 0.015


def test_scatter_does_not_bias_the_sum():
    fits = [fit_steps(samples(2000, noise=0.25, seed=seed), SHAPE, 2) for seed in range(4)]
    assert abs(np.mean([fit.bias for fit in fits])) < 0.015


def test_stalled_steps_do_not_bend_the_fit():
    stalled = [
        dataclasses.replace(s, duration_us=s.duration_us * 50) if i % 200 == 3 else s
        for i, s in enumerate(samples())
    ]
    fit = fit_steps(stalled, SHAPE, 2)
    assert fit.coefficients_us["base"] == pytest.approx(TRUE["base"], rel=0.25)


def test_a_machine_that_slows_down_halfway_shows():
    rows = [
        dataclasses.replace(s, duration_us=s.duration_us * (1.0 if i < 450 else 2.0))
        for i, s in enumerate(samples(900))
    ]
    low, high = fit_steps(rows, SHAPE, 2).slowness
    assert high / low == pytest.approx(2.0, rel=0.15)
    assert fit_steps(samples(900), SHAPE, 2).slowness == pytest.approx((1.0, 1.0), abs=0.05)


def test_active_experts_bend():
    at = [active_experts(n, SHAPE) for n in (0, 1, 8, 64, 512)]
    assert at[:2] == [0.0, pytest.approx(4.0)]
    assert at[2] < 8 * 4
    assert at[4] == pytest.approx(32.0)


@pytest.mark.parametrize("chunk", [300.0, 0.0])
def test_the_profile_predicts_what_was_fitted(chunk):
    fit = fit_steps(samples(noise=0.0), SHAPE, 2)
    profile = profile_from_fit(fit, "x", "y", Layout(2), 10_000)
    pairs = 9e4 if chunk else 0.0
    batch = BatchShape(
        *(np.array(v, float) for v in ((chunk or 7, 20), (0, 4000), (pairs, 0), (0, 0), (7, 20)))
    )
    tokens = (chunk or 7) + 20
    experts = np.full((4, 2), active_experts(tokens, SHAPE) / 2)
    got = step_time(profile, batch, experts, np.full((4, 2), tokens * 4 / 2)).total_us
    c = fit.coefficients_us
    # Dense and attention are the slowest rank's together, not each one's own maximum.
    slowest = max(
        (chunk or 7) * c["rank_token"] + pairs * c["prefill_pair"],
        20 * c["rank_token"] + 4000 * c["decode_kv_token"],
    )
    want = c["base"] + slowest + 20 * c["request"] + 27 * c["group_request"]
    want += tokens * c["group_token"] + experts[0, 0] * c["active_expert"]
    want += c["prefill_step"] if chunk else 0.0
    assert got == pytest.approx(want, rel=1e-6)


def test_too_few_steps_are_refused():
    with pytest.raises(ValueError, match="10 steps are too few"):
        fit_steps(samples(10), SHAPE, 2)
