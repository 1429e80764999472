"""What engines learn from steps, with and without a board to publish on."""

import pytest

from gimbal.core.queue import ORDERINGS
from gimbal.sim.engine import Engine
from gimbal.sim.requests import StepBatch
from gimbal.sim.signals import Signals


@pytest.mark.parametrize("fresh", [True, False])
def test_queues_learn_the_prefill_rate_from_prefills_only(fresh):
    engines = [Engine(i, 512, 128, 1000, 16, ORDERINGS.build("hrrn")) for i in range(2)]
    signals = Signals(engines, fresh, 100e3)
    busy, decoding = StepBatch(prefill_tokens=500, decodes=3), StepBatch(decodes=8)
    signals.step_done([busy, decoding], 50e3)
    for _ in range(20):
        signals.step_done([decoding, decoding], 10e3)
    assert [e.prefill_rate for e in engines] == [pytest.approx(10_000.0), 0.0]
    signals.step_done([busy, decoding], 25e3)
    assert engines[0].prefill_rate == pytest.approx(12_000.0)
