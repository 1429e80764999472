"""The judgement of a process's memory."""

from __future__ import annotations

import math
import os
import random

import pytest

from tests.live.check.memory import (
    MIB,
    TOLERATED_BYTES,
    judge,
    judge_all,
    render,
    sample,
    slope_per_s,
    unshared_bytes,
)

BASE = 500 * MIB
TIMES = [2.0 * i for i in range(300)]


def test_a_leak_in_the_second_half_is_seen():
    leaking = [(t, int(BASE + t * 40_000)) for t in TIMES]
    judged = judge("p", leaking)
    assert judged.slope_per_s == pytest.approx(40_000, rel=1e-3)
    assert judged.growth == pytest.approx(40_000 * 299, rel=0.01)
    assert not judged.flat
    assert judged.after > judged.before


def test_what_grows_in_the_first_half_only_is_flat():
    warming = [(t, int(BASE * min(1.0, 0.5 + t / 500))) for t in TIMES]
    judged = judge("p", warming)
    assert judged.growth == 0
    assert judged.flat


def test_noise_and_spikes_are_flat_and_less_memory_is_too():
    rng = random.Random(1)
    noisy = [(t, BASE + rng.randrange(8 * MIB)) for t in TIMES]
    assert judge("p", noisy).flat
    spike = [(t, BASE + (300 * MIB if 500 < t < 520 else 0)) for t in TIMES]
    assert judge("p", spike).growth == 0
    assert judge("p", [(t, BASE - int(t * 1e5)) for t in TIMES]).flat


def test_a_saw_tooth_is_flat_unless_its_floor_rises():
    def saw(rise: float) -> list[tuple[float, int]]:
        return [(t, int(BASE + 6 * MIB * (t % 20) / 20 + rise * t)) for t in TIMES]

    assert judge("p", saw(0.0)).flat
    assert not judge("p", saw(50_000.0)).flat


def test_the_tolerance_is_a_share_and_at_least_some_bytes():
    small = judge("p", [(t, 10 * MIB) for t in TIMES])
    assert small.tolerated == TOLERATED_BYTES
    large = judge("p", [(t, 1000 * MIB) for t in TIMES])
    assert large.tolerated == pytest.approx(10 * MIB)


def test_who_ended_or_came_too_late_is_not_judged():
    steady = [(t, BASE) for t in TIMES]
    processes = {"lives": steady, "ended": steady[:100], "new": steady[-5:], "nothing": []}
    assert [row.name for row in judge_all(processes, TIMES[-1])] == ["lives"]
    assert judge("p", steady[:39]) is None


def test_slope_is_exact_on_a_line_and_ignores_one_moment_twice():
    assert slope_per_s([(0.0, 0), (1.0, 3), (1.0, 3), (2.0, 6)]) == 3.0


def test_status_of_a_process_is_read():
    text = "Name:\tx\nVmRSS:\t 900 kB\nRssAnon:\t 300 kB\nRssFile:\t 200 kB\nRssShmem:\t 400 kB\n"
    assert unshared_bytes(text) == 500 * 1024
    ((name, value),) = sample([os.getpid(), 2**22 + 1]).items()
    assert name.endswith(f"({os.getpid()})")
    assert value > MIB


def test_every_process_has_a_line():
    rows = judge_all({"a": [(t, int(BASE + t * 40_000)) for t in TIMES]}, TIMES[-1])
    table = render(rows)
    assert table.row_count == 1
    assert list(table.columns[-1].cells) == ["GROWS"]
    assert math.isfinite(rows[0].growth)
