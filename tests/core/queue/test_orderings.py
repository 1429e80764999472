import pytest

from gimbal.core.contracts import traits_of
from gimbal.core.errors import InputError
from gimbal.core.queue import ORDERINGS
from gimbal.core.queue.gimbal import GimbalOrdering, GimbalOrderingOptions
from gimbal.core.queue.heap import WaitingHeap
from gimbal.testing import queue_state, queued


def order(ordering_name: str, arrivals, served_at_end: float = 0.0) -> list[str]:
    """Serving order of (name, tokens, arrival, served before) when nothing is served meanwhile."""
    heap: WaitingHeap[str] = WaitingHeap(ORDERINGS.build(ordering_name))
    for name, tokens, at, served in arrivals:
        now = queue_state(at, served_tokens=served)
        heap.add(queued(tokens, name, at, served_before_tokens=served), name, now)
    heap.refresh(queue_state(99.0, served_tokens=served_at_end))
    return [heap.pop(99.0).item for _ in range(len(heap))]


ARRIVALS = [("long", 4000, 0.0, 0.0), ("mid", 400, 1.0, 500.0), ("short", 40, 2.0, 1000.0)]


@pytest.mark.parametrize(
    ("ordering", "served", "expected"),
    [
        ("fcfs", 0.0, ["long", "mid", "short"]),
        ("sjf", 0.0, ["short", "mid", "long"]),
        # Ratios: long 1040/4000, mid 540/400, short 40/40.
        ("hrrn", 1040.0, ["mid", "short", "long"]),
        # Aging at 250 tokens/s: keys 4000, 250+400+400, 500+400+40+40.
        ("gimbal", 0.0, ["short", "mid", "long"]),
    ],
)
def test_order(ordering, served, expected):
    assert order(ordering, ARRIVALS, served) == expected


def test_unknown_ordering_names_the_nearest():
    with pytest.raises(InputError, match="did you mean 'hrrn'"):
        ORDERINGS.build("hrnn")


def test_hrrn_is_dynamic_and_falls_back_to_arrival_order_above_128():
    assert traits_of(ORDERINGS.build("hrrn")).dynamic
    assert not traits_of(ORDERINGS.build("gimbal")).dynamic
    arrivals = [(f"r{i}", 1000 - i, float(i), 0.0) for i in range(129)]
    assert order("hrrn", arrivals, 500.0) == [a[0] for a in arrivals]
    assert order("hrrn", arrivals[1:], 500.0) == [a[0] for a in arrivals[:0:-1]]


def test_gimbal_key_by_hand():
    ordering = GimbalOrdering(GimbalOrderingOptions(backlog_factor=2.0))
    assert ordering.key(queued(100), queue_state(5.0)) == 100.0
    # 3 s at 1000 / (2 * 5) tokens/s, and a tenth of the first one's work.
    five = queue_state(8.0, waiting_requests=5)
    assert ordering.key(queued(7), five) == pytest.approx(10 + 300 + 7)
    # A clock that jumps back does not move the virtual one.
    assert ordering.key(queued(1), queue_state(4.0)) == pytest.approx(310 + 0.7 + 1)


@pytest.mark.parametrize("bad", [(0.5, 1.0, 1.0), (2.0, -1.0, 1.0), (2.0, 1.0, -1.0)])
def test_gimbal_refuses_arguments_that_break_the_bound(bad):
    with pytest.raises(ValueError, match="must be >="):
        GimbalOrderingOptions(*bad)
