"""What the hook reads from vLLM's objects, and what it attaches to them."""

import inspect
import sys
from types import SimpleNamespace

import pytest

pytest.importorskip("torch")

from gimbal.core.guard import LevelGuard
from gimbal.core.snapshot import Field
from gimbal.vllm_plugin.engine import news
from gimbal.vllm_plugin.placement.hook import (
    MODEL_RUNNERS,
    attach_news,
    batch_tokens,
    patch_model_runner,
    patch_model_runners,
)
from gimbal.vllm_plugin.placement.member import Member
from gimbal.vllm_plugin.placement.rebalance_log import RebalanceLog


@pytest.mark.parametrize(
    ("scheduled", "proposed", "expected"),
    [
        ({}, {}, (0, 0)),
        ({"a": 100, "b": 1}, {}, (100, 1)),
        ({"a": 1, "b": 1}, {}, (0, 2)),
        ({"a": 4, "b": 4}, {"a": [7, 8, 9]}, (4, 4)),
    ],
)
def test_tokens_of_a_step_by_kind(scheduled, proposed, expected):
    output = SimpleNamespace(num_scheduled_tokens=scheduled, scheduled_spec_decode_tokens=proposed)
    assert batch_tokens(output) == expected


def member(pressure_us):
    found = Member(LevelGuard("placement"), lambda vote: [vote], None)
    found.controller = SimpleNamespace(
        pressure_us=pressure_us, pressure_news=True, rebalance_log=RebalanceLog(None)
    )
    return found


def test_pressure_travels_with_a_real_output_once():
    empty = SimpleNamespace(req_ids=[])
    sender = member(2.0)
    attach_news(sender, empty)
    assert not hasattr(empty, news.PRESSURE_US)
    assert sender.controller.pressure_news
    output = SimpleNamespace(req_ids=["a"])
    attach_news(sender, SimpleNamespace(_model_runner_output=output))
    assert getattr(output, news.PRESSURE_US) == 2.0
    assert not sender.controller.pressure_news
    assert not hasattr(output, news.FALLBACKS)


@pytest.mark.parametrize("late", ["_model_runner_output", "model_runner_output"])
def test_both_model_runners_are_followed(monkeypatch, late):
    """Whichever the worker has imported: V1 and V2 name the output that is on its way otherwise."""

    class Runner:
        def __init__(self, sender):
            self.eplb_state = SimpleNamespace(_gimbal_member=sender)
            self.output = SimpleNamespace(req_ids=["a"])

        def execute_model(self, scheduler_output, intermediate_tensors=None, dummy_run=False):
            return None

        def sample_tokens(self, grammar_output):
            return SimpleNamespace(**{late: self.output})

    monkeypatch.setitem(sys.modules, MODEL_RUNNERS[1], SimpleNamespace(GPUModelRunner=Runner))
    monkeypatch.setitem(sys.modules, MODEL_RUNNERS[0], None)  # not imported in this worker
    patch_model_runners()
    patch_model_runners()  # a second model of the same worker changes nothing
    runner = Runner(member(2.0))
    step = SimpleNamespace(num_scheduled_tokens={"a": 7, "b": 1}, scheduled_spec_decode_tokens={})
    runner.execute_model(step, dummy_run=False)
    assert runner.eplb_state._gimbal_member.controller.batch == (7, 1)
    runner.sample_tokens(None)
    assert getattr(runner.output, news.PRESSURE_US) == 2.0


@pytest.mark.slow
def test_vllms_own_v2_runner_can_be_followed(monkeypatch):
    """It needs Triton to run a step; its class is there without, and so is what it returns."""
    runner = pytest.importorskip("vllm.v1.worker.gpu.model_runner").GPUModelRunner
    async_output = pytest.importorskip("vllm.v1.worker.gpu.async_utils").AsyncOutput
    for name in ("execute_model", "sample_tokens"):
        monkeypatch.setattr(runner, name, getattr(runner, name))  # taken back after the test
    patch_model_runner(runner)
    sender, steps = member(2.0), []
    failed = SimpleNamespace(
        execute_model_state=None,  # the step before failed: vLLM answers nothing
        eplb_state=SimpleNamespace(_gimbal_member=sender),
        eplb=SimpleNamespace(step=lambda **kind: steps.append(kind)),
    )
    assert runner.sample_tokens(failed, None) is None
    assert steps == [{"is_dummy": False, "is_profile": False}]
    assert sender.controller.pressure_news  # for the next output
    assert isinstance(runner.eplb_state, property)
    assert "self.model_runner_output = " in inspect.getsource(async_output.__init__)


def test_figures_of_placement_travel_when_they_have_changed():
    sender = member(2.0)
    log = sender.controller.rebalance_log
    first, second = SimpleNamespace(req_ids=["a"]), SimpleNamespace(req_ids=["a"])
    attach_news(sender, first)
    assert not hasattr(first, news.PLACEMENT)
    log.unsent = True
    log.figures[Field.PLACEMENT_COMMITS] = 3
    attach_news(sender, SimpleNamespace(req_ids=[]))
    assert log.unsent
    attach_news(sender, first)
    attach_news(sender, second)
    assert getattr(first, news.PLACEMENT)[Field.PLACEMENT_COMMITS] == 3
    assert not hasattr(second, news.PLACEMENT)


def test_fallbacks_travel_when_there_are_more():
    sender = member(2.0)
    sender.guard.counts |= {"no plan": 2, "replica tables": 1}
    first, second = SimpleNamespace(req_ids=["a"]), SimpleNamespace(req_ids=["a"])
    attach_news(sender, first)
    assert getattr(first, news.FALLBACKS) == 3
    attach_news(sender, second)
    assert not hasattr(second, news.FALLBACKS)
    sender.guard.counts["no plan"] += 1
    attach_news(sender, second)
    assert getattr(second, news.FALLBACKS) == 4
    assert not hasattr(second, news.PRESSURE_US)
    assert not hasattr(second, news.OFF)


def test_a_level_that_ends_says_so_once():
    sender = member(2.0)
    sender.off = True  # by another rank's vote
    first, second = SimpleNamespace(req_ids=["a"]), SimpleNamespace(req_ids=["a"])
    attach_news(sender, SimpleNamespace(req_ids=[]))
    attach_news(sender, first)
    attach_news(sender, second)
    assert getattr(first, news.OFF) is True
    assert not hasattr(second, news.OFF)
