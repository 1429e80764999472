"""What tests of the regimes share."""

from __future__ import annotations

import json

import pytest

from gimbal.sim.capacity import Capacity
from reproduction import regimes
from reproduction.regimes import Regime


@pytest.fixture
def small_regime(tmp_path, monkeypatch):
    """A regime of a small trace; its capacity is said, not searched."""
    path = tmp_path / "trace.jsonl"
    rows = [
        {"arrival_s": i * 0.05, "prompt_tokens": 60 + 41 * i % 700, "output_tokens": 2 + i % 9}
        for i in range(120)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    known = Capacity(40.0, ((20.0, 0.5), (40.0, 1.0)))
    monkeypatch.setattr(regimes, "capacity_of", lambda options, bed, say: known)
    return Regime("small", str(path), "h100x4-paper")
