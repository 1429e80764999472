"""Snapshots of engines on other hosts, brought to the front end's board over ZeroMQ.

Where data parallelism spans hosts, an engine away from the front end publishes each row to a
socket instead of shared memory; one thread on the front end's host writes it into the engine's
slot, so readers know no difference. Clocks of two hosts differ, so a row counts as taken when it
arrives. Rows are dropped, never queued, when nobody listens: the next one is better anyway. A row
is checked before it enters the board: what is no engine's row is refused, counted and said once.
"""

from __future__ import annotations

import logging
import socket
import threading
from typing import Any

import numpy as np
import zmq

from gimbal.board.clock import now_us
from gimbal.board.file import Board
from gimbal.board.slots import SlotWriter
from gimbal.board.wire import RefusedRow, bracketed, made_socket, parse_row, peer, row_head
from gimbal.core.contracts import FloatArray
from gimbal.core.errors import one_line
from gimbal.core.snapshot import MAX_ENGINES, Field, check_row
from gimbal.vllm_plugin.engine.remote_control import HELD_MAGIC, ControlSender, parse_held

logger = logging.getLogger("vllm.gimbal")

_POLL_MS = 200
_PAUSE_S = 0.02
"""After a failure: a board that cannot be made is not tried at the rate of rows."""
_AT_ONCE = 4 * MAX_ENGINES
"""Messages that are looked at before any is written."""
CLOSE_S = 2.0
FIRST_ROW_S = 5.0


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
        self._socket = made_socket(zmq.PUB, address)
        self._socket.setsockopt(zmq.SNDHWM, 16)
        self._socket.connect(bracketed(address))
        self._head = row_head(engine)

    def publish(self, row: FloatArray, now_s: float | None = None) -> None:
        """Sends `row` [ROW_WIDTH]; never waits. Raises ImplausibleRow for one that is none."""
        check_row(row)
        self._socket.send(self._head + row.tobytes(), zmq.NOBLOCK)

    def close(self) -> None:
        """Closes the socket."""
        self._socket.close()


class RowReceiver:
    """A thread that writes the rows of other hosts' engines into their slots.

    It ends when it is told to and for no other reason: whatever a row or the board raises is
    counted and said once, and the board is opened again.

    Args:
        board: the server's board; the thread opens its own.
        address: where to listen, ``tcp://host:port``.

    Attributes:
        received: rows written so far.
        refused: messages that were no row, or for a slot that a local engine writes.
        failures: rows that could not be written, and failures of the socket.

    Raises zmq.ZMQError when it cannot listen there, and OSError as `Board`.
    """

    def __init__(self, board: Board, address: str) -> None:
        self.received = 0
        self.refused = 0
        self.failures = 0
        # Its own: a board belongs to one thread.
        self._board = board.for_another_thread()
        self._socket = made_socket(zmq.XSUB, address)
        try:
            self._socket.setsockopt(zmq.SNDHWM, 16)
            self._socket.bind(bracketed(address))
            self._socket.send(b"\1")  # a subscription to everything, of whoever will connect
        except zmq.ZMQError:
            self._socket.close()
            raise
        self.address: str = self._socket.getsockopt(zmq.LAST_ENDPOINT).decode()
        self._control = ControlSender(self._board, self._send)
        self._writers: dict[int, SlotWriter] = {}
        self._heard: set[int] = set()
        self._said: set[tuple[int, str]] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gimbal-rows", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread, which closes the socket; waits `CLOSE_S` at most."""
        self._stop.set()
        self._thread.join(CLOSE_S)
        if self._thread.is_alive():
            logger.warning("Gimbal: the thread for rows of other hosts does not end; left behind")
        else:
            self._board.close()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._control.look()
                if self._socket.poll(_POLL_MS):
                    self._take_all()
            except zmq.ContextTerminated:  # the process ends, and waits for this socket
                break
            except Exception as error:
                self._survive(error)
        self._socket.close()

    def _send(self, message: bytes) -> None:
        self._socket.send(message, zmq.NOBLOCK)

    def _survive(self, error: Exception) -> None:
        """After something other than a bad row: counted, and everything is opened again."""
        self.failures += 1
        self._say(-1, "failed", f"rows of other hosts: {one_line(error)}")
        self._writers.clear()
        self._board.look()
        self._stop.wait(_PAUSE_S)

    def _take_all(self) -> None:
        """Checks what has come and writes the newest row of each engine.

        Where rows come faster than they can be written, those between are left out.
        """
        newest: dict[int, tuple[FloatArray, Any]] = {}
        for _ in range(_AT_ONCE):
            try:
                frame = self._socket.recv(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                break
            taken = self._take(frame)
            if taken is not None:
                newest[taken[0]] = taken[1], frame
        for engine, (row, frame) in newest.items():
            self._write(engine, row, frame)

    def _take(self, frame: Any) -> tuple[int, FloatArray] | None:
        """The engine and its row; None for what is no row."""
        message = frame.bytes
        try:
            if not message.startswith(HELD_MAGIC):
                return parse_row(message)
            self._take_held(message, frame)
        except RefusedRow as refusal:
            self._refuse(refusal.engine, refusal.kind, f"{peer(frame)}: {refusal}")
        return None

    def _take_held(self, message: bytes, frame: Any) -> None:
        """An engine says which control message it holds."""
        try:
            engine, version = parse_held(message)
        except ValueError as error:
            raise RefusedRow(-1, "control", str(error)) from None
        if not self._is_local(engine, frame):
            self._control.heard(engine, version)

    def _write(self, engine: int, row: FloatArray, frame: Any) -> None:
        if self._is_local(engine, frame):
            return
        row[Field.TIMESTAMP_US] = now_us()
        writer = self._writers.get(engine)
        if writer is None:
            writer = self._writers[engine] = SlotWriter(self._board, engine)
        writer.publish(row)
        self.received += 1
        if engine not in self._heard:
            self._heard.add(engine)
            logger.info("Gimbal: engine %d publishes from %s", engine, peer(frame))

    def _is_local(self, engine: int, frame: Any) -> bool:
        local = self._board.written_by_another(engine)
        if local:
            said = f"{peer(frame)}: engine {engine} is on this host as well"
            self._refuse(engine, "local", said)
        return local

    def _refuse(self, engine: int, kind: str, said: str) -> None:
        self.refused += 1
        self._say(engine, kind, f"row refused, from {said}")

    def _say(self, engine: int, kind: str, said: str) -> None:
        """Each kind of trouble with an engine once: a row comes twice a step."""
        if (engine, kind) not in self._said:
            self._said.add((engine, kind))
            logger.warning("Gimbal: %s; counted from now on, not logged again", said)


class FirstRows:
    """Which engines of other hosts owe an answer and have never said anything.

    An engine without work says nothing, and what it said before somebody listened is lost. So an
    engine is missed once it has owed an answer for `FIRST_ROW_S`.

    Args:
        address: where their rows are awaited, ``tcp://host:port``.
        local: engines of this host; theirs are the first ranks.
    """

    def __init__(self, address: str, local: int) -> None:
        self.address = address
        self.local = local
        self._since_s: dict[int, float] = {}
        self._said: set[int] = set()

    def look(self, rows: FloatArray, owed: FloatArray, now_s: float) -> None:
        """Says once of each engine that its rows do not come.

        Args:
            rows: [engines, ROW_WIDTH] the newest, zeros where there is none.
            owed: [engines] requests that were sent there and are not acknowledged.
            now_s: of a clock that only goes on.
        """
        silent = np.flatnonzero((rows[:, Field.SEQUENCE] == 0.0) & (owed > 0.0)).tolist()
        since = self._since_s
        self._since_s = {e: since.get(e, now_s) for e in silent if e >= self.local}
        for engine, since_s in self._since_s.items():
            if now_s - since_s >= FIRST_ROW_S and engine not in self._said:
                self._said.add(engine)
                logger.error(
                    "Gimbal: engine %d has work and no row of it has come to %s in %.0f s: that "
                    "port must be open to its host, and board_port the same on all hosts; until "
                    "then tokens in flight decide",
                    engine,
                    self.address,
                    now_s - since_s,
                )
