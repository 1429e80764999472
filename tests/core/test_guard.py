"""A fallback's line in the log says what failed."""

import logging

import pytest

from gimbal.core.errors import PolicyError
from gimbal.core.guard import LevelGuard


def test_the_log_names_the_policy_that_failed(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("vllm.gimbal"), "propagate", True)
    guard = LevelGuard("dispatch", max_consecutive=3)
    for number in range(3):
        guard.fell_back("error", PolicyError(f"dispatch policy 'p{number}': costs\nare NaN"))
    first, last = (record.getMessage() for record in caplog.records)
    assert "(error: dispatch policy 'p0': costs are NaN); counted" in first
    assert "off after 3 consecutive failures (last: error: dispatch policy 'p2': costs" in last
    assert guard.disabled
    assert guard.counts == {"error": 3}


def test_a_fallback_without_an_error_never_ends_the_level():
    guard = LevelGuard("dispatch", max_consecutive=2)
    for _ in range(5):
        guard.fell_back("stale")
    assert not guard.disabled
    assert guard.counts == {"stale": 5}


def broken():
    raise RuntimeError("on purpose")


def test_what_runs_answers_and_what_fails_answers_nothing():
    guard = LevelGuard("queue")
    assert guard.run("sum", sum, [1, 2]) == 3
    assert guard.run("sum", broken) is None
    assert guard.counts == {"sum": 1}


def test_each_reason_counts_its_own_failures():
    """A part that works must not hide one that fails every time."""
    guard = LevelGuard("queue", max_consecutive=3)
    for _ in range(2):
        guard.run("broken", broken)
        guard.run("works", int)
    assert not guard.disabled
    guard.run("broken", int)
    for _ in range(2):
        guard.run("broken", broken)
    assert not guard.disabled
    guard.run("broken", broken)
    assert guard.disabled
    assert guard.counts == {"broken": 5}


def test_interrupts_pass():
    with pytest.raises(KeyboardInterrupt):
        LevelGuard("queue").run("stop", interrupted)


def interrupted():
    raise KeyboardInterrupt


class Unprintable(Exception):
    def __str__(self):
        raise RuntimeError("no text")


def unprintable():
    raise Unprintable


def test_neither_a_metric_nor_the_text_of_an_error_can_fail_a_fallback(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("vllm.gimbal"), "propagate", True)
    guard = LevelGuard("queue", max_consecutive=1, on_fallback=lambda *_: broken())
    guard.run("text", unprintable)
    assert guard.counts == {"text": 1}
    assert guard.disabled
    assert "(last: text: Unprintable)" in caplog.records[-1].getMessage()
