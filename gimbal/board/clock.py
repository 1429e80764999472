"""The one clock of a host that all of Gimbal's processes share."""

from __future__ import annotations

import time


def now_us() -> float:
    """CLOCK_MONOTONIC in microseconds: one clock for all processes of a host."""
    return time.monotonic_ns() / 1e3
