"""Rows of an engine on another host arrive in its slot of the front end's board."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

from gimbal.board.clock import now_us
from gimbal.board.file import Board, board_path
from gimbal.board.layout import BOARD_BYTES
from gimbal.board.slots import BoardReader
from gimbal.board.wire import HEAD, RefusedRow, bracketed, parse_row
from gimbal.core.snapshot import MAX_ENGINES, ROW_WIDTH, Field, ImplausibleRow, row_problem
from gimbal.vllm_plugin.engine import remote
from tests.waiting import until

ENGINE = """
import sys, time, numpy as np
from gimbal.vllm_plugin.engine.remote import RowSender
sender, row = RowSender(sys.argv[1], int(sys.argv[2])), np.zeros(int(sys.argv[3]))
for number in range(1, 10_000):
    row[0], row[1], row[5] = number, 7.0, number
    sender.publish(row)
    time.sleep(0.002)
"""


@pytest.fixture
def board(tmp_path: Path) -> Board:
    return Board(board_path("server", tmp_path))


def test_rows_of_another_process_arrive_with_this_hosts_clock(board: Board) -> None:
    receiver = remote.RowReceiver(board, "tcp://127.0.0.1:0")
    reader = BoardReader(board, 3)
    command = [sys.executable, "-c", ENGINE, receiver.address, "2", str(ROW_WIDTH)]
    process = subprocess.Popen(command)
    try:
        until(lambda: reader.read()[2][Field.SEQUENCE] >= 20)
        row = reader.read()[2]
        assert row[Field.RUNNING_REQUESTS] == row[Field.SEQUENCE]
        assert 0 <= now_us() - row[Field.TIMESTAMP_US] < 5e6
        assert not reader.read()[:2].any()
    finally:
        process.kill()
        process.wait()
        receiver.close()
    assert receiver.refused == 0
    seen = reader.read()[2, Field.SEQUENCE]
    time.sleep(0.05)
    assert reader.read()[2, Field.SEQUENCE] == seen, "an engine that is gone publishes nothing"


def test_nobody_listening_costs_nothing() -> None:
    sender = remote.RowSender("tcp://127.0.0.1:1", 0)
    for _ in range(100):
        sender.publish(np.zeros(ROW_WIDTH))
    sender.close()


def test_foreign_messages_and_local_slots_are_refused(board: Board) -> None:
    receiver = remote.RowReceiver(board, "tcp://127.0.0.1:0")
    code = (
        "import sys, numpy; from pathlib import Path;"
        "from gimbal.board.file import Board;"
        "from gimbal.board.slots import SlotWriter;"
        "writer = SlotWriter(Board(Path(sys.argv[1])), 1);"
        f"writer.publish(numpy.full({ROW_WIDTH}, 4.0));"
        "print('written', flush=True); sys.stdin.read()"
    )
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", code, str(board.path)]
    local = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
    assert local.stdout is not None
    local.stdout.readline()
    head = HEAD.pack(b"GBR1", 1, ROW_WIDTH)
    for message in (b"", b"x" * 8, head, head + bytes(8 * ROW_WIDTH), b"GBR0" + head[4:]):
        take(receiver, message)
    assert (receiver.received, receiver.refused) == (0, 5)
    assert BoardReader(board, 2).read()[1, 0] == 4.0
    local.communicate("")
    receiver.close()


def test_of_rows_that_have_piled_up_the_newest_of_each_engine_is_written(board: Board) -> None:
    receiver = remote.RowReceiver(board, "tcp://127.0.0.1:0")
    receiver.close()
    receiver._board = board.for_another_thread()
    waiting = [frame(message(e, SEQUENCE=n), "10.0.0.7") for n in range(1, 51) for e in (1, 2)]
    waiting += [frame(message(1, STEP_TIME_US=-1.0), "10.0.0.7"), frame(b"", "10.0.0.8")]

    def recv(*_: Any, **__: Any) -> Any:
        if not waiting:
            raise zmq.Again
        return waiting.pop(0)

    receiver._socket = SimpleNamespace(recv=recv)
    receiver._take_all()
    assert BoardReader(board, 3).read()[:, Field.SEQUENCE].tolist() == [0, 50, 50]
    assert (receiver.received, receiver.refused) == (2, 2)
    receiver._board.close()


def frame(message: bytes, peer: str) -> Any:
    """A message as ZeroMQ hands it over."""
    return SimpleNamespace(bytes=message, get=lambda name: peer)


def take(receiver: remote.RowReceiver, message: bytes, peer: str = "10.0.0.9") -> None:
    """One message, as the receiver's thread takes it."""
    checked = receiver._take(frame(message, peer))
    if checked is not None:
        receiver._write(*checked, frame(message, peer))


def message(engine: int = 1, **fields: float) -> bytes:
    """A row of `engine` as it travels, with some of its columns."""
    row = np.zeros(ROW_WIDTH)
    row[Field.SEQUENCE] = 1.0
    for name, value in fields.items():
        row[Field[name]] = value
    return HEAD.pack(b"GBR1", engine, ROW_WIDTH) + row.tobytes()


@pytest.fixture
def receiver(board: Board) -> Iterator[remote.RowReceiver]:
    made = remote.RowReceiver(board, "tcp://127.0.0.1:0")
    yield made
    made.close()


@pytest.fixture
def sender(receiver: remote.RowReceiver) -> Iterator[Any]:
    """A socket that is connected to the receiver and has been heard."""
    socket = zmq.Context.instance().socket(zmq.PUB)
    socket.setsockopt(zmq.LINGER, 0)
    socket.connect(receiver.address)
    until(lambda: socket.send(message(0)) or receiver.received)
    yield socket
    socket.close()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"STEP_TIME_US": float("nan")}, "step_time_us is nan"),
        ({"WAITING_REQUESTS": float("inf")}, "waiting_requests is inf"),
        ({"STEP_PREFILL_TOKENS": -3.0}, "step_prefill_tokens is -3"),
        ({"RUNNING_TOKENS": 1e17}, "running_tokens is 1e+17"),
        ({"KV_BLOCKS_USED": 9.0, "KV_BLOCKS_TOTAL": 8.0}, "kv_blocks_used is 9 of 8"),
    ],
)
def test_a_row_that_no_engine_can_mean_is_refused_and_said_once(
    board: Board,
    receiver: remote.RowReceiver,
    sender: Any,
    caplog: pytest.LogCaptureFixture,
    fields: dict[str, float],
    said: str,
) -> None:
    reader = BoardReader(board, 2)
    until(lambda: sender.send(message(1, DECODING_REQUESTS=4.0)) or reader.read()[1].any())
    before = receiver.received
    for _ in range(20):
        sender.send(message(1, **fields))
    until(lambda: receiver.refused >= 20)
    assert reader.read()[1, Field.DECODING_REQUESTS] == 4.0
    lines = [record.message for record in caplog.records if "refused" in record.message]
    assert len(lines) == 1
    assert f"from 127.0.0.1: engine 1: {said};" in lines[0]
    until(lambda: sender.send(message(1, DECODING_REQUESTS=5.0)) or receiver.received > before)


def test_another_version_says_so_once_and_on_one_line(
    receiver: remote.RowReceiver, caplog: pytest.LogCaptureFixture
) -> None:
    head = HEAD.pack(b"GBR1", 3, ROW_WIDTH + 4)
    for _ in range(10):
        take(receiver, head + bytes(8 * (ROW_WIDTH + 4)), "10.0.0.7")
    assert receiver.refused == 10
    (line,) = [record.message for record in caplog.records if "refused" in record.message]
    assert f"10.0.0.7: engine 3 sends {ROW_WIDTH + 4} numbers a row" in line
    assert "one version of Gimbal" in line
    assert "\n" not in line


@given(
    st.one_of(
        st.binary(max_size=700),
        st.builds(
            lambda engine, width, body: HEAD.pack(b"GBR1", engine, width) + body,
            st.integers(0, 65535),
            st.sampled_from([0, ROW_WIDTH, ROW_WIDTH + 1, 65535]),
            st.binary(max_size=700) | st.just(bytes(8 * ROW_WIDTH)),
        ),
        st.builds(
            lambda engine, values: message(engine, **values),
            st.integers(0, 300),
            st.dictionaries(st.sampled_from([f.name for f in Field]), st.floats()),
        ),
    )
)
def test_any_message_is_a_plausible_row_or_refused(data: bytes) -> None:
    try:
        engine, row = parse_row(data)
    except RefusedRow:
        return
    assert 0 <= engine < MAX_ENGINES
    assert row.shape == (ROW_WIDTH,)
    assert row_problem(row) is None


@pytest.mark.parametrize("replacement", ["short file", "directory", "cut short"])
def test_the_receiver_outlives_its_board(
    board: Board, receiver: remote.RowReceiver, sender: Any, replacement: str
) -> None:
    """While rows arrive, the file goes; they arrive again once it can be made anew."""
    path, reader = board.path, BoardReader(board, 2)
    if replacement == "cut short":
        os.truncate(path, 10)
    if replacement == "short file":
        short = path.with_name("short")
        short.write_text("short")
        short.chmod(0o600)
        short.replace(path)  # at once: the receiver may be making the file anew
    if replacement == "directory":
        path.unlink()
        path.mkdir()
        until(lambda: sender.send(message(1)) or receiver.failures >= 3)
        path.rmdir()

    sequence = 0

    def send() -> bool:
        nonlocal sequence
        sequence += 1
        sender.send(message(1, SEQUENCE=sequence))
        fresh = BoardReader(Board(path), 2) if _whole(path) else None
        return fresh is not None and bool(fresh.read()[1, Field.SEQUENCE])

    until(send)
    assert receiver._thread.is_alive()
    until(lambda: send() and reader.read()[1, Field.SEQUENCE] == sequence)


def _whole(path: Path) -> bool:
    """Whether a board is there; the receiver takes away and makes files meanwhile."""
    try:
        return path.stat().st_size == BOARD_BYTES
    except FileNotFoundError:
        return False


def test_the_receiver_outlives_whatever_a_row_raises(
    receiver: remote.RowReceiver, sender: Any, monkeypatch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    class Unforeseen(Exception):
        pass

    def fail(engine: int) -> bool:
        raise Unforeseen("out of the blue")

    monkeypatch.setattr(receiver._board, "written_by_another", fail)
    until(lambda: sender.send(message(1)) or receiver.failures >= 3)
    monkeypatch.undo()
    before = receiver.received
    until(lambda: sender.send(message(1)) or receiver.received > before)
    assert sum("out of the blue" in record.message for record in caplog.records) == 1


def test_an_oversized_message_costs_no_memory_and_no_rows(
    receiver: remote.RowReceiver, sender: Any
) -> None:
    sender.send(bytes(64 << 20))
    before = receiver.received
    until(lambda: sender.send(message(0)) or receiver.received > before)
    assert receiver.refused == 0, "zmq cuts it off before it is taken in"


def test_closing_is_bounded(board: Board, monkeypatch: Any) -> None:
    receiver = remote.RowReceiver(board, "tcp://127.0.0.1:0")
    stuck, go = threading.Event(), threading.Event()

    def hang(*message: Any) -> None:
        stuck.set()
        go.wait(60)

    monkeypatch.setattr(receiver, "_take_all", hang)
    monkeypatch.setattr(remote, "CLOSE_S", 0.05)
    socket = zmq.Context.instance().socket(zmq.PUB)
    socket.setsockopt(zmq.LINGER, 0)
    socket.connect(receiver.address)
    until(lambda: socket.send(message(0)) or stuck.is_set())
    receiver.close()
    assert receiver._thread.is_alive(), "it waited for a thread that hangs"
    go.set()
    receiver._thread.join(60)
    assert not receiver._thread.is_alive()
    socket.close()


def test_an_address_in_use_is_an_error_and_leaves_nothing(
    board: Board, receiver: remote.RowReceiver
) -> None:
    with pytest.raises(zmq.ZMQError, match="in use"):
        remote.RowReceiver(board, receiver.address)


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("tcp://::1:18655", "tcp://[::1]:18655"),
        ("tcp://[::1]:18655", "tcp://[::1]:18655"),
        ("tcp://fe80::1%eth0:1", "tcp://[fe80::1%eth0]:1"),
        ("tcp://10.0.0.1:5", "tcp://10.0.0.1:5"),
        ("tcp://host.example:5", "tcp://host.example:5"),
        ("tcp://*:5", "tcp://*:5"),
    ],
)
def test_ipv6_hosts_get_brackets(address: str, expected: str) -> None:
    assert bracketed(address) == expected


@pytest.mark.skipif(not remote.is_this_host("::1"), reason="no IPv6 here")
@pytest.mark.parametrize("host", ["::1", "[::1]", "localhost"])
def test_rows_travel_over_ipv6(board: Board, host: str) -> None:
    receiver = remote.RowReceiver(board, f"tcp://{host}:0")
    port = receiver.address.rpartition(":")[2]
    sender = remote.RowSender(f"tcp://{host}:{port}", 1)
    row = np.ones(ROW_WIDTH)
    until(lambda: sender.publish(row) or receiver.received)
    assert BoardReader(board, 2).read()[1, Field.SEQUENCE] == 1.0
    sender.close()
    receiver.close()


def test_a_sender_refuses_what_a_receiver_would() -> None:
    sender = remote.RowSender("tcp://127.0.0.1:1", 0)
    with pytest.raises(ImplausibleRow, match="sequence is nan"):
        sender.publish(np.full(ROW_WIDTH, np.nan))
    sender.close()


def test_an_engine_that_is_never_heard_of_is_named_once(caplog: Any) -> None:
    first_rows = remote.FirstRows("tcp://10.0.0.1:29551", local=1)
    rows, owed = np.zeros((4, ROW_WIDTH)), np.array([1.0, 1.0, 0.0, 1.0])
    rows[3, Field.SEQUENCE] = 7.0

    def said_at(now_s: float) -> list[str]:
        caplog.clear()
        first_rows.look(rows, owed, now_s)
        return [record.message for record in caplog.records if record.levelname == "ERROR"]

    assert said_at(100.0) == said_at(104.9) == []
    (line,) = said_at(105.0)  # engine 0 is of this host, 2 owes nothing, 3 has been heard of
    assert "engine 1 has work and no row of it has come to tcp://10.0.0.1:29551" in line
    assert said_at(200.0) == []
    owed[2] = 1.0
    assert said_at(300.0) == []
    rows[2, Field.SEQUENCE] = 1.0
    assert said_at(304.0) == []
    rows[2, Field.SEQUENCE] = 0.0  # a new board: it is awaited anew
    assert said_at(306.0) == []
    assert len(said_at(311.0)) == 1


@pytest.mark.parametrize(
    ("size", "local", "local_only", "expected"),
    [(4, 2, False, True), (4, 4, False, False), (4, 2, True, False), (1, 1, False, False)],
)
def test_only_servers_over_several_hosts_open_a_port(
    size: int, local: int, local_only: bool, expected: bool
) -> None:
    parallel = SimpleNamespace(
        data_parallel_size=size, data_parallel_size_local=local, local_engines_only=local_only
    )
    assert remote.spans_hosts(SimpleNamespace(parallel_config=parallel)) is expected


def test_addresses_of_this_host() -> None:
    assert remote.is_this_host("127.0.0.1")
    assert not remote.is_this_host("203.0.113.7")


@pytest.mark.parametrize(
    ("address", "local_only", "expected"),
    [("127.0.0.1", False, False), ("203.0.113.7", False, True), ("203.0.113.7", True, False)],
)
def test_an_engine_knows_whether_its_front_end_is_elsewhere(
    address: str, local_only: bool, expected: bool
) -> None:
    parallel = SimpleNamespace(data_parallel_master_ip=address, local_engines_only=local_only)
    found = remote.front_end_is_elsewhere(SimpleNamespace(parallel_config=parallel))
    assert found is expected


def test_the_port_is_next_to_vllms() -> None:
    config: Any = SimpleNamespace(parallel_config=SimpleNamespace(data_parallel_rpc_port=29550))
    assert remote.board_port(config, 0) == 29551
    assert remote.board_port(config, 1234) == 1234
