"""What calibration sends, and what it learns of the front end from lone requests."""

import dataclasses

import pytest

from gimbal.bench import calibration_load as load
from gimbal.core.cost.calibrate import StepSample


def test_batches_cover_the_sizes_and_fit_the_context():
    trace = load.batches(1024)
    together = {}
    for request in trace.requests:
        together.setdefault(request.arrival_s, []).append(request.prompt_tokens)
    sizes = sorted(len(group) for group in together.values())
    assert sizes[0] == 2
    assert sizes[-1] == 128
    assert max(r.prompt_tokens for r in trace.requests) <= 1024 - load.BATCH_OUTPUT


@pytest.mark.parametrize("rate", [2.0, 30.0])
def test_mixed_load_arrives_at_its_rate(rate):
    trace = load.mixed(8192, 200, rate, 1)
    assert 199 / trace.span_s == pytest.approx(rate, rel=0.05)
    assert trace == load.mixed(8192, 200, rate, 1)
    assert trace != load.mixed(8192, 200, rate, 2)


def test_front_end_time_is_what_engine_and_step_boundary_leave_of_the_first_token():
    sample = StepSample(0.0, 20e3, 1, 0, 0, 1, 1, 2, True)
    # 200 steps of 20 ms in 8 s: busy half the time, so the mean wait is 5 ms.
    busy = [dataclasses.replace(sample, time_s=10 + i * 0.04) for i in range(200)]
    elsewhere = [dataclasses.replace(sample, duration_us=9e6, time_s=50.0)]
    first = load.PhaseTimes(100e3, 80e3, 10.0, 18.0, 30)
    second = load.PhaseTimes(200e3, 170e3, 10.0, 18.0, 10)
    assert load.front_end_us([first], busy + elsewhere) == pytest.approx(15e3)
    assert load.front_end_us([first, second], busy) == pytest.approx((30 * 15e3 + 10 * 25e3) / 40)


def test_front_end_time_is_zero_without_phases():
    assert load.front_end_us([], []) == 0.0
