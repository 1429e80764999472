"""Rows of an engine on another host arrive in its slot of the front end's board."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from gimbal.board.clock import now_us
from gimbal.board.file import Board, board_path
from gimbal.board.slots import BoardReader
from gimbal.core.snapshot import ROW_WIDTH, Field
from gimbal.vllm_plugin.engine import remote

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
        deadline = time.monotonic() + 30
        while (row := reader.read()[2])[Field.SEQUENCE] < 20 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert row[Field.SEQUENCE] >= 20
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
    head = remote._HEAD.pack(b"GBR1", 1, ROW_WIDTH)
    for message in (b"", b"x" * 8, head, head + bytes(8 * ROW_WIDTH), b"GBR0" + head[4:]):
        receiver._take(message)
    assert (receiver.received, receiver.refused) == (0, 5)
    assert BoardReader(board, 2).read()[1, 0] == 4.0
    local.communicate("")
    receiver.close()


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
