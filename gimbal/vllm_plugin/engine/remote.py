"""Snapshots of engines on other hosts, brought to the front end's board over ZeroMQ.

Where data parallelism spans hosts, an engine away from the front end publishes each row to a
socket instead of shared memory; one thread on the front end's host writes it into the engine's
slot, so readers know no difference. Clocks of two hosts differ, so a row counts as taken when it
arrives. Rows are dropped, never queued, when nobody listens: the next one is better anyway. A row
is checked before it enters the board: what is no engine's row is refused, counted and said once.
"""

from __future__ import annotations

import logging
import re
import socket
import struct
import threading
from typing import Any

import numpy as np
import zmq

from gimbal.board.clock import now_us
from gimbal.board.file import Board
from gimbal.board.slots import SlotWriter
from gimbal.core.contracts import FloatArray
from gimbal.core.errors import one_line
from gimbal.core.snapshot import MAX_ENGINES, ROW_WIDTH, Field, check_row, row_problem

logger = logging.getLogger("vllm.gimbal")

_HEAD = struct.Struct("<4sHH")  # magic, engine, row width
_MAGIC = b"GBR1"
_POLL_MS = 200
_LARGEST_MESSAGE = 1 << 16
"""Bytes: a row is far smaller, also in a version with more columns; who sends more is cut off."""
_PAUSE_S = 0.02
"""After a failure: a board that cannot be made is not tried at the rate of rows."""
_AT_ONCE = 4 * MAX_ENGINES
"""Messages that are looked at before any is written."""
CLOSE_S = 2.0
FIRST_ROW_S = 5.0
_IPV4 = re.compile(r"[\d.]+|\*")


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
        self._socket = _socket(zmq.PUB, address)
        self._socket.setsockopt(zmq.SNDHWM, 16)
        self._socket.connect(bracketed(address))
        self._head = _HEAD.pack(_MAGIC, engine, ROW_WIDTH)

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
        self._socket = _socket(zmq.SUB, address)
        try:
            self._socket.setsockopt(zmq.SUBSCRIBE, b"")
            self._socket.setsockopt(zmq.MAXMSGSIZE, _LARGEST_MESSAGE)
            self._socket.bind(bracketed(address))
        except zmq.ZMQError:
            self._socket.close()
            raise
        self.address: str = self._socket.getsockopt(zmq.LAST_ENDPOINT).decode()
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
                if self._socket.poll(_POLL_MS):
                    self._take_all()
            except zmq.ContextTerminated:  # the process ends, and waits for this socket
                break
            except Exception as error:
                self._survive(error)
        self._socket.close()

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
            checked = self._checked(frame)
            if checked is not None:
                newest[checked[0]] = checked[1], frame
        for engine, (row, frame) in newest.items():
            self._write(engine, row, frame)

    def _checked(self, frame: Any) -> tuple[int, FloatArray] | None:
        try:
            return parse_row(frame.bytes)
        except RefusedRow as refusal:
            self._refuse(refusal.engine, refusal.kind, f"{_peer(frame)}: {refusal}")
            return None

    def _write(self, engine: int, row: FloatArray, frame: Any) -> None:
        if self._board.written_by_another(engine):
            said = f"{_peer(frame)}: engine {engine} is on this host as well"
            self._refuse(engine, "local", said)
            return
        row[Field.TIMESTAMP_US] = now_us()
        writer = self._writers.get(engine)
        if writer is None:
            writer = self._writers[engine] = SlotWriter(self._board, engine)
        writer.publish(row)
        self.received += 1
        if engine not in self._heard:
            self._heard.add(engine)
            logger.info("Gimbal: engine %d publishes from %s", engine, _peer(frame))

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


class RefusedRow(ValueError):
    """A message that is no row of this version.

    Attributes:
        engine: whose it claims to be; -1 where it does not say, or names none that can be.
        kind: ``message``, ``version``, ``engine`` or ``numbers``.
    """

    def __init__(self, engine: int, kind: str, said: str) -> None:
        super().__init__(said)
        self.engine = engine
        self.kind = kind


def parse_row(message: bytes) -> tuple[int, FloatArray]:
    """The engine and its row [ROW_WIDTH]. Raises RefusedRow."""
    if len(message) < _HEAD.size or not message.startswith(_MAGIC):
        raise RefusedRow(-1, "message", f"{len(message)} bytes that are no row of an engine")
    _, engine, width = _HEAD.unpack_from(message)
    if engine >= MAX_ENGINES:
        raise RefusedRow(-1, "engine", f"engine {engine}: a board holds {MAX_ENGINES} engines")
    if width != ROW_WIDTH:
        said = f"engine {engine} sends {width} numbers a row, this host reads {ROW_WIDTH}"
        raise RefusedRow(engine, "version", f"{said}: install one version of Gimbal on all hosts")
    if len(message) != _HEAD.size + 8 * ROW_WIDTH:
        raise RefusedRow(engine, "message", f"engine {engine}: a row of {len(message)} bytes")
    row = np.frombuffer(message, np.float64, offset=_HEAD.size).copy()
    problem = row_problem(row)
    if problem is not None:
        raise RefusedRow(engine, "numbers", f"engine {engine}: {problem}")
    return engine, row


def bracketed(address: str) -> str:
    """``tcp://host:port`` with brackets round an IPv6 host that came without."""
    scheme, _, rest = address.partition("://")
    host, _, port = rest.rpartition(":")
    return f"{scheme}://[{host}]:{port}" if ":" in host and not host.startswith("[") else address


def _socket(kind: int, address: str) -> Any:
    made: Any = zmq.Context.instance().socket(kind)
    made.setsockopt(zmq.LINGER, 0)
    host = address.partition("://")[2].rpartition(":")[0]
    # A host name may have either kind of address. With an IPv4 address nothing needs IPv6, which
    # this machine may not have.
    made.setsockopt(zmq.IPV6, int(not _IPV4.fullmatch(host)))
    return made


def _peer(frame: Any) -> str:
    """Address of the host that `frame` came from."""
    try:
        return str(frame.get("Peer-Address"))
    except (zmq.ZMQError, ValueError, LookupError):
        return "unknown address"
