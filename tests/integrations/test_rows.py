"""Rows travel from engines to any subscriber: named, aged, signed, bounded and checked."""

from __future__ import annotations

import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

from gimbal.board import published
from gimbal.board.published import RowPublisher, Source, packed, unpacked
from gimbal.board.wire import RefusedRow
from gimbal.core.endpoints import Endpoint, parse_endpoints
from gimbal.core.errors import InputError
from gimbal.core.snapshot import ROW_WIDTH, Field, row_problem
from gimbal.integrations import rows as integration
from gimbal.integrations.rows import RowReader
from tests.waiting import until

SECRET = b"a secret of many bytes"
WEB = Source("web:8000", 1)


def _row(sequence: float, epoch: float = 1.0, waiting: float = 0.0) -> np.ndarray:
    row = np.zeros(ROW_WIDTH)
    row[Field.SEQUENCE], row[Field.EPOCH], row[Field.WAITING_REQUESTS] = sequence, epoch, waiting
    return row


def _publisher(text: str, source: Source, secret: bytes | None = None) -> RowPublisher:
    return RowPublisher(parse_endpoints(text, "publish_to"), source, secret)


@pytest.fixture
def reader() -> Iterator[RowReader]:
    made = RowReader(["@tcp://127.0.0.1:0"], SECRET)
    yield made
    made.close()


class Clock:
    """A clock that goes on when it is told to."""

    def __init__(self) -> None:
        self.us = 1e9

    def __call__(self) -> float:
        return self.us


@pytest.fixture
def by_hand() -> Iterator[tuple[RowReader, Clock]]:
    """A reader that hears of nobody but the test."""
    clock = Clock()
    made = RowReader(clock=clock)
    yield made, clock
    made.close()


def test_engines_that_call_are_told_apart_by_name_and_rank(reader: RowReader) -> None:
    sources = [Source("web:8000", 0), Source("web:8000", 1), Source("web:8001", 0)]
    publishers = [_publisher(reader.listens[0], source, SECRET) for source in sources]
    try:
        for number in range(1, 1000):
            for i, publisher in enumerate(publishers):
                publisher.publish(_row(number, waiting=i), published.now_us())
            if len(reader.sources()) == 3:
                break
            time.sleep(0.01)
        assert sorted(reader.sources()) == sources
        assert reader.rows(sources)[:, Field.WAITING_REQUESTS].tolist() == [0.0, 1.0, 2.0]
        assert (reader.ages_us(sources) < 5e6).all()
        unknown = [Source("web:8002", 0)]
        assert not reader.rows(unknown).any()
        assert np.isinf(reader.ages_us(unknown)).all()
        assert np.isinf(reader.heard_us(unknown)).all()
        reader.forget(sources[0])
        assert len(publishers) == 3
    finally:
        for publisher in publishers:
            publisher.close()
    assert reader.refused == 0


ENGINE = """
import sys, time, numpy as np
from gimbal.board.clock import now_us
from gimbal.board.published import RowPublisher, Source
from gimbal.core.endpoints import parse_endpoints
publisher = RowPublisher(parse_endpoints("@tcp://127.0.0.1:0", ""), Source(sys.argv[1], 0))
print(publisher.addresses[0], flush=True)
row = np.zeros(int(sys.argv[2]))
row[2], row[0] = float(sys.argv[3]), 1.0
publisher.publish(row, now_us())
time.sleep(600)
"""


def _engine(name: str, epoch: float) -> tuple[subprocess.Popen[str], str]:
    command = [sys.executable, "-c", ENGINE, name, str(ROW_WIDTH), str(epoch)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def test_who_comes_late_hears_of_an_idle_engine_and_of_its_end() -> None:
    process, address = _engine("idle", 1.0)
    reader, idle = RowReader(), [Source("idle", 0)]
    try:
        reader.follow(address)
        until(lambda: reader.sources() == tuple(idle))
        until(lambda: reader.received >= 3)
        ages, heard = reader.ages_us(idle), reader.heard_us(idle)
        assert ages[0] > 2 * published.BEAT_S * 1e6 * 0.5, "said again is not taken again"
        assert heard[0] < ages[0]
        process.kill()
        process.wait()
        until(lambda: reader.heard_us(idle)[0] > 1e6)
        assert reader.rows(idle)[0, Field.SEQUENCE] == 1.0, "the last word stays"
        reader.unfollow(address)
        reader.unfollow(address)
        until(lambda: reader.failures == 1)
    finally:
        process.kill()
        process.wait()
        reader.close()
    assert not reader._thread.is_alive()


def test_engines_of_one_host_listen_at_ports_of_their_own() -> None:
    free = zmq.Context.instance().socket(zmq.PUB)
    port = free.bind_to_random_port("tcp://127.0.0.1", 20_000, 60_000)
    taken = f"@tcp://127.0.0.1:{port - 1}"
    with pytest.raises(zmq.ZMQError, match=rf"tcp://127.0.0.1:{port}: Address already in use"):
        _publisher(taken, Source("web", 1))
    free.close()
    with pytest.raises(zmq.ZMQError, match="no-such-host"):
        _publisher("@tcp://no-such-host.invalid:5570", Source("web", 0))


@pytest.mark.parametrize(
    ("theirs", "ours", "said"),
    [
        (None, SECRET, "not signed"),
        (b"another secret!!", SECRET, "another secret"),
        (SECRET, None, "no secret here"),
    ],
)
def test_a_wrong_secret_is_said_once_with_the_address(
    theirs: bytes | None, ours: bytes | None, said: str, caplog: Any
) -> None:
    reader = RowReader(["@tcp://127.0.0.1:0"], ours)
    publisher = _publisher(reader.listens[0], WEB, theirs)
    try:
        until(lambda: publisher.publish(_row(1), 0.0) or reader.refused >= 3)
    finally:
        publisher.close()
        reader.close()
    assert reader.sources() == ()
    (line,) = [record.message for record in caplog.records if "refused" in record.message]
    assert said in line
    assert "127.0.0.1" in line


def test_no_bit_of_a_signed_row_can_be_changed() -> None:
    message = packed(WEB, _row(3), 250.0, SECRET)
    assert unpacked(message, SECRET)[0] == WEB
    for at in range(len(message)):
        wrong = bytearray(message)
        wrong[at] ^= 1
        with pytest.raises(RefusedRow):
            unpacked(bytes(wrong), SECRET)


def test_a_row_of_another_version_is_named(reader: RowReader, caplog: Any) -> None:
    message = packed(WEB, np.zeros(ROW_WIDTH + 4), 0.0, None)
    for body in (message, message[: -4 * 8]):
        head = struct.pack("<4sHHBBQ", b"GBP1", 1, ROW_WIDTH + 4, 8, 32, 0)
        signed = head + body[published._HEAD.size :]
        signed += published._signature(signed, SECRET)
        for _ in range(3):
            reader._take(signed, "10.0.0.7")
    assert reader.refused == 6
    (line,) = [record.message for record in caplog.records]
    assert f"from 10.0.0.7: engine 1 of web:8000 sends {ROW_WIDTH + 4} numbers a row" in line
    assert "install one version of Gimbal" in line
    assert "\n" not in line


def test_what_was_recorded_and_is_sent_again_says_nothing(
    by_hand: tuple[RowReader, Clock],
) -> None:
    reader, clock = by_hand
    old, new = packed(WEB, _row(1, 5.0), 0.0, None), packed(WEB, _row(2, 5.0), 1000.0, None)
    for message in (old, new):
        reader._take(message)
    assert reader.ages_us([WEB]).tolist() == [1000.0]
    clock.us += 500_000.0
    reader._take(old)
    assert reader.refused == 1
    reader._take(new)
    assert reader.ages_us([WEB]).tolist() == [501_000.0]
    assert reader.heard_us([WEB]).tolist() == [0.0]
    reader._take(packed(WEB, _row(1, 6.0, waiting=4.0), 0.0, None))  # a new process
    assert reader.rows([WEB])[0, Field.WAITING_REQUESTS] == 4.0
    reader._take(new)
    assert reader.refused == 2
    # A new process on a host whose clock was set back: believed when the old one is gone.
    clock.us += integration.SILENT_US + 1.0
    reader._take(new)
    assert reader.rows([WEB])[0, Field.SEQUENCE] == 2.0


def test_the_number_of_engines_is_bounded(
    by_hand: tuple[RowReader, Clock], monkeypatch: Any, caplog: Any
) -> None:
    reader, clock = by_hand
    monkeypatch.setattr(integration, "MOST_SOURCES", 3)
    for i in range(5):
        reader._take(packed(Source(f"s{i}", 0), _row(1), 0.0, None))
    assert len(reader.sources()) == 3
    assert reader.refused == 2
    assert sum("more than 3 engines" in record.message for record in caplog.records) == 1
    clock.us += integration.FORGET_US + 1.0
    reader._take(packed(WEB, _row(1), 0.0, None))
    assert reader.sources() == (WEB,)


@pytest.mark.parametrize(
    ("source", "row", "said"),
    [
        (Source("", 0), _row(1), "no name"),
        (Source("a\nb", 0), _row(1), "no name"),
        (Source("x" * 129, 0), _row(1), "no name"),
        (Source("x", 256), _row(1), "rank 256"),
        (Source("x", 0), np.full(ROW_WIDTH, np.nan), "sequence is nan"),
        (Source("x", 0), _row(-1), "sequence is -1"),
    ],
)
def test_what_no_engine_means_is_refused(source: Source, row: np.ndarray, said: str) -> None:
    with pytest.raises(RefusedRow, match=said):
        unpacked(packed(source, row, 0.0, None), None)


@given(
    st.one_of(
        st.binary(max_size=800),
        st.builds(
            lambda rank, width, named, signed, age, body: (
                struct.pack("<4sHHBBQ", b"GBP1", rank, width, named, signed, age) + body
            ),
            st.integers(0, 300),
            st.sampled_from([ROW_WIDTH, 0, ROW_WIDTH + 1]),
            st.integers(0, 255),
            st.sampled_from([0, 32, 7]),
            st.integers(0, 2**64 - 1),
            st.binary(max_size=80).map(lambda name: name + bytes(8 * ROW_WIDTH)),
        ),
    ),
    st.sampled_from([None, SECRET]),
)
def test_any_message_is_a_row_or_refused(message: bytes, secret: bytes | None) -> None:
    try:
        source, row, age_us = unpacked(message, secret)
    except RefusedRow:
        return
    assert source.name.isprintable()
    assert row_problem(row) is None
    assert 0.0 <= age_us <= 2.0**64


def test_strangers_cost_nothing(reader: RowReader) -> None:
    stranger = zmq.Context.instance().socket(zmq.PUB)
    stranger.setsockopt(zmq.LINGER, 0)
    stranger.connect(reader.listens[0])
    publisher = _publisher(reader.listens[0], WEB, SECRET)
    try:
        until(lambda: stranger.send(b"GBP1") or reader.refused)
        stranger.send(bytes(64 << 20))
        until(lambda: publisher.publish(_row(1), 0.0) or reader.received)
    finally:
        stranger.close()
        publisher.close()
    assert reader.sources() == (WEB,)


@pytest.mark.parametrize("address", ["web:5570", "@tcp://web:5570", "tcp://a:1,tcp://b:1", ""])
def test_what_cannot_be_called_is_refused(by_hand: tuple[RowReader, Clock], address: str) -> None:
    with pytest.raises(InputError, match="address: "):
        by_hand[0].follow(address)


def test_a_reader_that_cannot_listen_says_so(reader: RowReader) -> None:
    with pytest.raises(zmq.ZMQError, match="in use"):
        RowReader([f"@{reader.listens[0]}"])


def test_nobody_listens_and_closing_is_bounded() -> None:
    publisher = RowPublisher([Endpoint(False, "127.0.0.1", 1)], WEB)
    for number in range(1, 2000):
        publisher.publish(_row(number), 0.0)
    publisher.close()
    publisher.publish(_row(1), 0.0)
    assert not publisher._thread.is_alive()
    assert publisher.failures == 1, "a closed one counts, and raises nothing"
