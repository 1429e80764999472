"""Snapshots of engines on other hosts, brought to the front end's board over ZeroMQ.

Where data parallelism spans hosts, an engine away from the front end publishes each row to a
socket instead of shared memory; one thread on the front end's host writes it into the engine's
slot, so readers know no difference. Clocks of two hosts differ, so a row counts as taken when it
arrives. Rows are dropped, never queued, when nobody listens: the next one is better anyway.
"""

from __future__ import annotations

import logging
import socket
import struct
import threading
from typing import Any

import numpy as np
import zmq

from gimbal.board.clock import now_us
from gimbal.board.file import Board
from gimbal.board.layout import MAX_ENGINES
from gimbal.board.slots import SlotWriter
from gimbal.core.contracts import FloatArray
from gimbal.core.snapshot import ROW_WIDTH, Field

logger = logging.getLogger("vllm.gimbal")

_HEAD = struct.Struct("<4sHH")  # magic, engine, row width
_MAGIC = b"GBR1"
_POLL_MS = 200


def board_port(vllm_config: Any, configured: int) -> int:
    """The port all hosts of a server agree on: the configured one, or next to vLLM's own."""
    return configured or int(vllm_config.parallel_config.data_parallel_rpc_port) + 1


def spans_hosts(vllm_config: Any) -> bool:
    """Whether the front end dispatches to engines of more than one host."""
    parallel = vllm_config.parallel_config
    return (
        parallel.data_parallel_size > max(1, parallel.data_parallel_size_local)
        and not parallel.local_engines_only
    )


def front_end_is_elsewhere(vllm_config: Any) -> bool:
    """Whether the engine that asks is on another host than the front end.

    Not from the sizes: vLLM sets them to one in an engine of a dense model.
    """
    parallel = vllm_config.parallel_config
    return not parallel.local_engines_only and not is_this_host(parallel.data_parallel_master_ip)


def is_this_host(address: str) -> bool:
    """Whether `address` belongs to this machine (only then a socket can be bound to it)."""
    try:
        family, kind, _, _, target = socket.getaddrinfo(address, 0, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.bind(target)
    except OSError:
        return False
    return True


class RowSender:
    """An engine's sink when its front end is on another host.

    Args:
        address: ``tcp://host:port`` of the front end's `RowReceiver`.
        engine: DP rank.
    """

    def __init__(self, address: str, engine: int) -> None:
        self._socket: Any = zmq.Context.instance().socket(zmq.PUB)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, 16)
        self._socket.connect(address)
        self._head = _HEAD.pack(_MAGIC, engine, ROW_WIDTH)

    def publish(self, row: FloatArray, now_s: float | None = None) -> None:
        """Sends `row` [ROW_WIDTH]; never waits."""
        self._socket.send(self._head + row.tobytes(), zmq.NOBLOCK)

    def close(self) -> None:
        """Closes the socket."""
        self._socket.close()


class RowReceiver:
    """A thread that writes the rows of other hosts' engines into their slots.

    Args:
        board: the server's board.
        address: where to listen, ``tcp://host:port``.

    Attributes:
        received: rows written so far.
        refused: messages that were no row, or for a slot that a local engine writes.
    """

    def __init__(self, board: Board, address: str) -> None:
        self.received = 0
        self.refused = 0
        self._board = board
        self._socket: Any = zmq.Context.instance().socket(zmq.SUB)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SUBSCRIBE, b"")
        self._socket.bind(address)
        self.address: str = self._socket.getsockopt(zmq.LAST_ENDPOINT).decode()
        self._writers: dict[int, SlotWriter] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gimbal-rows", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread and closes the socket."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            if self._socket.poll(_POLL_MS):
                self._take(self._socket.recv())
        self._socket.close()

    def _take(self, message: bytes) -> None:
        engine, row = parse_row(message)
        if row is None or self._board.written_by_another(engine):
            self.refused += 1
            return
        if engine not in self._writers:
            self._writers[engine] = SlotWriter(self._board, engine)
            logger.info("Gimbal: engine %d publishes from another host", engine)
        row[Field.TIMESTAMP_US] = now_us()
        self._writers[engine].publish(row)
        self.received += 1


def parse_row(message: bytes) -> tuple[int, FloatArray | None]:
    """The engine and its row; no row when the message is not one of this version."""
    if len(message) != _HEAD.size + 8 * ROW_WIDTH:
        return -1, None
    magic, engine, width = _HEAD.unpack_from(message)
    if magic != _MAGIC or width != ROW_WIDTH or engine >= MAX_ENGINES:
        return -1, None
    return engine, np.frombuffer(message, np.float64, offset=_HEAD.size).copy()
