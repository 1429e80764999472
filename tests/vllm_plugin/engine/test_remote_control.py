"""Control reaches engines of other hosts over the port of their rows, and who holds it is known."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

from gimbal.board.file import Board, board_path
from gimbal.board.layout import CONTROL_BYTES, EVERY_CONTROL
from gimbal.board.slots import BoardReader
from gimbal.core.config import parse_config
from gimbal.core.errors import InputError
from gimbal.core.snapshot import ROW_WIDTH, Field
from gimbal.vllm_plugin.engine import remote
from gimbal.vllm_plugin.engine import remote_control as rc
from gimbal.vllm_plugin.engine.publishing import BoardSlot
from tests.waiting import until

CONFIG = parse_config({"levels": ["dispatch", "queue"], "admin": True})


@pytest.fixture
def board(tmp_path: Path) -> Board:
    return Board(board_path("server", tmp_path))


@pytest.fixture
def receiver(board: Board) -> Iterator[remote.RowReceiver]:
    made = remote.RowReceiver(board, "tcp://127.0.0.1:0")
    yield made
    made.close()


def test_control_travels_and_the_board_knows_who_holds_it(
    board: Board, receiver: remote.RowReceiver
) -> None:
    first, last = {"levels": ["dispatch"]}, {"ordering": "sjf", "queue": {"max_wait_s": 5.0}}
    early = rc.RemoteControl(receiver.address, 1, CONFIG)
    try:
        version = board.write_control(first)
        until(lambda: board.held(0, 3) == [0, version, 0])
        assert (early.control_version(), early.read_control()) == (version, first)
        # One that comes later is told without anybody switching anything again.
        late = rc.RemoteControl(receiver.address, 2, CONFIG)
        try:
            until(lambda: board.held(0, 3) == [0, version, version])
            version = board.write_control(last)
            until(lambda: board.held(1, 2) == [version, version])
            assert early.read_control() == late.read_control() == last
        finally:
            late.close()
    finally:
        early.close()
    assert (receiver.refused, receiver.failures, early.refused) == (0, 0, 0)


def test_rows_and_control_share_the_port(board: Board, receiver: remote.RowReceiver) -> None:
    sender, row = remote.RowSender(receiver.address, 1), np.ones(ROW_WIDTH)
    control = rc.RemoteControl(receiver.address, 1, CONFIG)
    version = board.write_control({"ordering": "sjf"})
    try:
        until(lambda: sender.publish(row) or receiver.received)
        until(lambda: sender.publish(row) or board.held(1, 1) == [version])
        assert BoardReader(board, 2).read()[1, Field.SEQUENCE] == 1.0
    finally:
        control.close()
        sender.close()
    assert receiver.refused == 0


def test_a_head_that_comes_back_is_found_again(board: Board) -> None:
    receiver = remote.RowReceiver(board, "tcp://127.0.0.1:0")
    address = receiver.address
    control = rc.RemoteControl(address, 1, CONFIG)
    try:
        version = board.write_control({"ordering": "sjf"})
        until(lambda: board.held(1, 1) == [version])
        receiver.close()
        version = board.write_control({"ordering": "fcfs"})
        time.sleep(0.05)
        assert board.held(1, 1) != [version], "nobody told it"
        receiver = remote.RowReceiver(board, address)
        until(lambda: board.held(1, 1) == [version])
        assert control.read_control() == {"ordering": "fcfs"}
    finally:
        control.close()
        receiver.close()


def test_engines_of_this_host_hold_every_message(
    board: Board, receiver: remote.RowReceiver
) -> None:
    slot = BoardSlot(Board(board.path), 0)
    try:
        assert board.held(0, 2) == [EVERY_CONTROL, 0]
        receiver._take(zmq.Frame(rc._HELD.pack(rc.HELD_MAGIC, 0, 0)))
        assert receiver.refused == 1, "it is on this host"
        assert board.held(0, 2) == [EVERY_CONTROL, 0]
    finally:
        slot.close()


def test_who_lacks_the_newest_is_told_again_but_not_at_every_word(board: Board) -> None:
    sent: list[bytes] = []
    now = [100.0]
    sender = rc.ControlSender(board, sent.append, lambda: now[0])
    sender.look()
    sender.heard(1, 0)
    assert sent == [], "nothing has been switched"
    board.write_control({"ordering": "sjf"})
    for _ in range(3):
        sender.look()
    assert [rc.parse_control(message, CONFIG) for message in sent] == [(1, {"ordering": "sjf"})]
    for _ in range(5):
        sender.heard(1, 0)
    assert len(sent) == 1
    now[0] += rc.REPEAT_S
    for engine in range(1, 9):
        sender.heard(engine, 0)
    assert len(sent) == 2, "one message goes to all"
    now[0] += 10.0
    sender.heard(1, 1)
    assert len(sent) == 2
    assert board.held(1, 2) == [1, 0]
    sender.heard(1, EVERY_CONTROL)
    assert board.held(1, 1) == [0], "no such message has been made"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"levels": "queue"}, "levels are no list"),
        ({"queue": []}, "queue is no mapping"),
        ({"queue": {"options": 3}}, "queue.options are no mapping"),
        ({"queue": {"max_wait": 3}}, "did you mean 'max_wait_s'?"),
        ({"queue": {"max_wait_s": "x"}}, "queue.max_wait_s"),
        ({"ordering": "fcf"}, "did you mean 'fcfs'?"),
        ({"ordering": 3}, "expected a name, got 3"),
        ({"ordering": "nowhere.x:Y"}, "cannot be imported"),
        ({"ordering": "sjf", "queue": {"options": {"weight": 3}}}, "unknown option 'weight'"),
    ],
)
def test_an_engine_keeps_what_it_had_when_it_cannot_follow(
    board: Board, receiver: remote.RowReceiver, caplog: Any, values: dict[str, Any], said: str
) -> None:
    """A head whose Gimbal or whose plugins are not this host's."""
    control = rc.RemoteControl(receiver.address, 1, CONFIG)
    try:
        good = board.write_control({"ordering": "sjf"})
        until(lambda: board.held(1, 1) == [good])
        board.write_control(values)
        until(lambda: control.refused >= 2)
        assert board.held(1, 1) == [good]
        assert control.read_control() == {"ordering": "sjf"}
        lines = [r.message for r in caplog.records if "keeps to the control before" in r.message]
        assert len(lines) == 1
        assert said in lines[0]
        assert "\n" not in lines[0]
        newest = board.write_control({})
        until(lambda: board.held(1, 1) == [newest])
    finally:
        control.close()


@given(
    st.one_of(
        st.binary(max_size=200),
        st.builds(
            lambda version, text: rc._CONTROL.pack(b"GBC1", version) + text,
            st.integers(0, EVERY_CONTROL),
            st.one_of(
                st.binary(max_size=200),
                st.just(b" " * (CONTROL_BYTES + 1)),
                st.just(b"[" * CONTROL_BYTES),
                st.recursive(
                    st.none() | st.booleans() | st.floats() | st.text(max_size=5),
                    lambda inner: (
                        st.lists(inner, max_size=3)
                        | st.dictionaries(
                            st.sampled_from(
                                ["levels", "queue", "ordering", "options", "step_budget"]
                            ),
                            inner,
                            max_size=4,
                        )
                    ),
                    max_leaves=12,
                ).map(lambda value: json.dumps(value).encode()),
            ),
        ),
    )
)
def test_any_message_is_control_or_refused(message: bytes) -> None:
    try:
        version, values = rc.parse_control(message, CONFIG)
    except InputError:
        return
    assert 0 <= version <= EVERY_CONTROL
    assert isinstance(values, dict)


@given(st.binary(max_size=40) | st.binary(min_size=10, max_size=10).map(lambda b: b"GBH1" + b))
def test_any_word_of_who_holds_what_is_one_or_refused(message: bytes) -> None:
    try:
        engine, version = rc.parse_held(message)
    except ValueError:
        return
    assert 0 <= engine < 256
    assert 0 <= version <= EVERY_CONTROL


def test_strangers_at_the_port_are_counted_and_harm_nobody(
    board: Board, receiver: remote.RowReceiver
) -> None:
    stranger: Any = zmq.Context.instance().socket(zmq.XPUB)
    stranger.setsockopt(zmq.LINGER, 0)
    stranger.connect(receiver.address)
    control = rc.RemoteControl(receiver.address, 1, CONFIG)
    version = board.write_control({"ordering": "sjf"})
    try:
        bad = [b"GBH1", rc._HELD.pack(b"GBH1", 256, 1), bytes(64 << 20), b"\1", b""]
        until(lambda: [stranger.send(m) for m in bad] and receiver.refused >= 2)
        until(lambda: board.held(1, 1) == [version])
        assert board.held(0, 1) == [0]
    finally:
        control.close()
        stranger.close()


def test_nobody_at_the_address_costs_nothing_and_closing_is_bounded() -> None:
    control = rc.RemoteControl("tcp://127.0.0.1:1", 0, CONFIG)
    assert (control.control_version(), control.read_control()) == (0, {})
    control.close()
    assert not control._thread.is_alive()
