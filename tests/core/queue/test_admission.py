from types import SimpleNamespace

import pytest

from gimbal.core.queue.admission import BlockedHeadGate, KvNeed, room_blocks

BIG, SMALL, TINY = KvNeed("big", 100), KvNeed("small", 10), KvNeed("tiny", 1)


def test_a_fitting_head_is_offered():
    assert BlockedHeadGate().choose([SMALL, TINY], 10, 1, 0.0) == 0


def test_smaller_requests_pass_for_bounded_steps_then_the_head_is_reserved_for():
    gate = BlockedHeadGate(max_steps=3, max_wait_s=100.0)
    chosen = [gate.choose([BIG, SMALL, TINY], 5, step, 0.0) for step in range(1, 6)]
    assert chosen == [2, 2, 2, 0, 0]
    assert (gate.passes, gate.reservations) == (3, 1)


def test_time_bounds_passing_too():
    gate = BlockedHeadGate(max_steps=1000, max_wait_s=1.0)
    assert [gate.choose([BIG, TINY], 5, 1, t) for t in (0.0, 0.9, 1.0)] == [1, 1, 0]


def test_nothing_fits_offers_the_head():
    assert BlockedHeadGate().choose([BIG, SMALL], 5, 1, 0.0) == 0


def test_a_head_overtaken_by_another_keeps_its_count_and_loses_it_when_it_leaves():
    gate = BlockedHeadGate(max_steps=2, max_wait_s=100.0)
    gate.choose([BIG, TINY], 5, 1, 0.0)
    assert gate.choose([SMALL, BIG], 10, 2, 0.0) == 0
    assert gate.choose([BIG, TINY], 5, 3, 0.0) == 0
    gate.forget("big")
    assert gate.choose([BIG, TINY], 5, 4, 0.0) == 1


@pytest.mark.parametrize(
    ("running", "prefill_left", "room", "blocks"),
    [
        (0, 0, 64, 0),  # whatever fits at all starts in an empty engine
        (3, 0, 0, 0),
        (3, 500, 0, 0),
        (3, 0, 64, 12),
        (3, 500, 64, 44),  # the rest of a prompt counts whole: 692 tokens
    ],
)
def test_admission_leaves_what_running_requests_grow_into(running, prefill_left, room, blocks):
    view = SimpleNamespace(
        running_requests=running, running_prefill_tokens=prefill_left, block_tokens=16
    )
    assert room_blocks(view, room) == blocks
