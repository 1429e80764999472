"""What tables keep of names that clients choose."""

import tracemalloc

import numpy as np
import pytest

from gimbal.core.config import DispatchConfig
from gimbal.core.contracts import DispatchRequest
from gimbal.core.dispatch.dispatcher import Dispatcher
from gimbal.core.dispatch.ledger import Ledger
from gimbal.core.dispatch.names import LONGEST, kept
from gimbal.core.dispatch.sessions import Sessions
from gimbal.core.snapshot import ROW_WIDTH

HALF_AN_EMOJI = "\ud83d"
MEGABYTE = 1 << 20


def test_names_up_to_the_limit_are_kept_and_longer_ones_hashed():
    assert kept("ann") == "ann"
    assert kept("a" * LONGEST) == "a" * LONGEST
    long = "a" * (LONGEST + 1)
    assert isinstance(kept(long), bytes)
    assert len(kept(long)) == 16
    assert kept(long) == kept("a" * (LONGEST + 1)) != kept(long + "a")


@pytest.mark.parametrize("length", [1, 1000])
def test_half_an_emoji_is_a_name(length):
    name, other = HALF_AN_EMOJI * length, "\ud83e" * length
    sessions = Sessions(10)
    sessions.note(name, 1)
    assert sessions.engine(name) == 1
    assert sessions.engine(other) is None
    ledger = Ledger(2)
    ledger.sent(name, 1, 10)
    assert ledger.engine_of(name) == ledger.finished(name) == 1
    assert ledger.finished(other) is None


def held_bytes(work):
    """Memory that `work` leaves allocated; its result is kept alive."""
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    result = work()
    held = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    return held, result


def test_two_thousand_sessions_of_a_megabyte_hold_little():
    def work():
        sessions = Sessions(65_536)
        for number in range(2000):
            sessions.note(f"{number:08d}" + "x" * MEGABYTE, number % 8)
        return sessions

    held, sessions = held_bytes(work)
    assert held < 10e6
    assert len(sessions) == 2000
    assert sessions.engine(f"{3:08d}" + "x" * MEGABYTE) == 3


def test_the_whole_dispatcher_holds_little_of_long_names():
    """Sessions and request ids of 1 MB, all in flight at once."""

    def work():
        dispatcher = Dispatcher(2, DispatchConfig())
        board = np.zeros((2, ROW_WIDTH))
        for number in range(300):
            name = f"{number:08d}" + "x" * MEGABYTE
            dispatcher.dispatch(DispatchRequest(name, 10, 0.0, name + "s"), None, board, 0.0)
        return dispatcher

    held, dispatcher = held_bytes(work)
    assert held < 10e6
    assert dispatcher.ledger.inflight[0].sum() == 300
    for number in range(300):
        dispatcher.finished(f"{number:08d}" + "x" * MEGABYTE)
    assert not dispatcher.ledger.inflight.any()
