"""A fallback's line in the log says what failed."""

import logging

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
