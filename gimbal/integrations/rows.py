"""A router's view of the engines that publish to it (`publish_to` in the configuration).

    reader = RowReader(["tcp://10.0.0.7:5570", "tcp://10.0.0.8:5570"], secret)
    sources = reader.sources()
    board = reader.rows(sources)  # columns as in `gimbal.core.snapshot.Field`
    overdue = reader.ages_us(sources) > 2e6

Needs pyzmq and neither vLLM nor torch. Nothing that comes over the network is trusted: messages are
bounded in size, their rows are checked as a board's are, and of an engine only what is newer than
what is known counts, so that a message which somebody recorded and sends again says nothing.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import zmq

from gimbal.board.clock import now_us
from gimbal.board.published import CLOSE_S, Source, unpacked
from gimbal.board.wire import RefusedRow, made_socket, peer
from gimbal.core.contracts import FloatArray
from gimbal.core.endpoints import Endpoint, parse_called, parse_endpoints
from gimbal.core.errors import one_line
from gimbal.core.snapshot import ROW_WIDTH, Field

logger = logging.getLogger("vllm.gimbal")

MOST_SOURCES = 4096
FORGET_US = 60e6
"""An engine of which nothing comes for so long leaves its place where others need one."""
SILENT_US = 5e6
"""After so long an engine that starts with an older clock than the last one is believed."""
_POLL_MS = 50
_PAUSE_S = 0.02
_BEAT_MS, _PATIENCE_MS = 1000, 5000
"""A host that is gone without a word is found out, and called again."""
_MOST_SAID = 64


class _Known(NamedTuple):
    """The newest of one engine.

    Attributes:
        row: [ROW_WIDTH] its timestamp is by this host's clock.
        heard_us: when its process last said anything, if only the same again.
    """

    row: FloatArray
    heard_us: float


class RowReader:
    """Takes in what engines publish, in a thread of its own.

    Args:
        addresses: as in `publish_to`: ``tcp://HOST:PORT`` of an engine that listens, or
            ``@tcp://HOST:PORT`` to listen for engines that call.
        secret: what rows must be signed with (`gimbal.core.endpoints.read_secret`); None takes
            unsigned rows only.
        clock: microseconds that only go on.

    Attributes:
        received: rows taken in, repetitions included.
        refused: messages that were no row, not signed as they should be, or older than known.
        failures: of the socket.
        listens: addresses that this side listens on, as ZeroMQ has them.

    Raises InputError for addresses that are none, zmq.ZMQError where it cannot listen.
    """

    def __init__(
        self,
        addresses: Iterable[str] = (),
        secret: bytes | None = None,
        clock: Callable[[], float] = now_us,
    ) -> None:
        self.received = self.refused = self.failures = 0
        self.listens: list[str] = []
        self._secret = secret
        self._clock = clock
        self._known: dict[Source, _Known] = {}
        self._said: set[tuple[Any, ...]] = set()
        self._calls: deque[tuple[bool, Endpoint]] = deque()
        endpoints = parse_endpoints(",".join(addresses), "addresses")
        # Engines that are followed later may have any kind of address.
        self._socket = made_socket(zmq.SUB, "tcp://localhost:0")
        self._socket.setsockopt(zmq.SUBSCRIBE, b"")
        self._socket.setsockopt(zmq.HEARTBEAT_IVL, _BEAT_MS)
        self._socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, _PATIENCE_MS)
        try:
            for endpoint in endpoints:
                self._open(endpoint)
        except zmq.ZMQError:
            self._socket.close()
            raise
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gimbal-reader", daemon=True)
        self._thread.start()

    def _open(self, endpoint: Endpoint) -> None:
        if endpoint.bound:
            self._socket.bind(endpoint.address)
            self.listens.append(self._socket.getsockopt(zmq.LAST_ENDPOINT).decode())
        else:
            self._socket.connect(endpoint.address)

    def follow(self, address: str) -> None:
        """Calls one more engine, soon. Raises InputError for what is no ``tcp://HOST:PORT``."""
        self._calls.append((True, parse_called(address, "address")))

    def unfollow(self, address: str) -> None:
        """Calls it no more. Raises InputError as `follow`."""
        self._calls.append((False, parse_called(address, "address")))

    def sources(self) -> tuple[Source, ...]:
        """All engines that are known, those that fell silent included."""
        return tuple(self._known)

    def rows(self, sources: Sequence[Source]) -> FloatArray:
        """[sources, ROW_WIDTH] the newest row of each; zeros where there is none.

        A row's timestamp is by this host's clock, the way over the network left out.
        """
        rows = np.zeros((len(sources), ROW_WIDTH))
        for i, source in enumerate(sources):
            known = self._known.get(source)
            if known is not None:
                rows[i] = known.row
        return rows

    def ages_us(self, sources: Sequence[Source]) -> FloatArray:
        """[sources] age of the newest row of each; infinity where there is none.

        An engine without work takes no new ones: see `heard_us`.
        """
        now = self._clock()
        return np.array([now - self._taken_us(source) for source in sources])

    def heard_us(self, sources: Sequence[Source]) -> FloatArray:
        """[sources] time since each last said anything; infinity where it never did.

        A process that lives repeats itself every `gimbal.board.published.BEAT_S`.
        """
        now = self._clock()
        found = [self._known.get(source) for source in sources]
        return np.array([np.inf if known is None else now - known.heard_us for known in found])

    def forget(self, source: Source) -> None:
        """Drops what is known of `source`."""
        self._known.pop(source, None)

    def close(self) -> None:
        """Ends the thread, which closes the socket; waits `CLOSE_S` at most."""
        self._stop.set()
        self._thread.join(CLOSE_S)

    def _taken_us(self, source: Source) -> float:
        known = self._known.get(source)
        return -np.inf if known is None else float(known.row[Field.TIMESTAMP_US])

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                while self._calls:
                    self._call(*self._calls.popleft())
                if self._socket.poll(_POLL_MS):
                    frame = self._socket.recv(copy=False)
                    self._take(frame.bytes, peer(frame))
            except zmq.ContextTerminated:  # the process ends, and waits for this socket
                break
            except Exception as error:
                self.failures += 1
                self._say(("failed",), f"rows of engines: {one_line(error)}")
                self._stop.wait(_PAUSE_S)
        self._socket.close()

    def _call(self, follow: bool, endpoint: Endpoint) -> None:
        (self._socket.connect if follow else self._socket.disconnect)(endpoint.address)

    def _take(self, message: bytes, host: str = "unknown address") -> None:
        try:
            source, row, age_us = unpacked(message, self._secret)
            self._enter(source, row, age_us)
        except RefusedRow as refusal:
            self.refused += 1
            # A row of an older time is nobody's mistake: the network may bring it twice.
            if refusal.kind != "older":
                key = (host, refusal.engine, refusal.kind)
                self._say(key, f"row refused, from {host}: {refusal}")
            return
        self.received += 1

    def _enter(self, source: Source, row: FloatArray, age_us: float) -> None:
        """Takes up a row that left `age_us` after it was taken. Raises RefusedRow."""
        now = self._clock()
        row[Field.TIMESTAMP_US] = taken_us = now - age_us
        known = self._known.get(source)
        if known is None:
            self._make_room(now)
        else:
            place, before = _place(row), _place(known.row)
            if place < before:
                restarted = place[0] < before[0] and now - known.heard_us > SILENT_US
                if not restarted:
                    raise RefusedRow(source.rank, "older", f"{source}: older than what is known")
            elif place == before:  # said again
                row[Field.TIMESTAMP_US] = min(taken_us, float(known.row[Field.TIMESTAMP_US]))
        self._known[source] = _Known(row, now)

    def _make_room(self, now: float) -> None:
        """Raises RefusedRow where one more engine has no place."""
        if len(self._known) < MOST_SOURCES:
            return
        for source, known in tuple(self._known.items()):
            if now - known.heard_us > FORGET_US:
                self.forget(source)
        if len(self._known) >= MOST_SOURCES:
            raise RefusedRow(-1, "engine", f"more than {MOST_SOURCES} engines publish here")

    def _say(self, key: tuple[Any, ...], said: str) -> None:
        """Each trouble once, and so many at most: an engine's row comes twice a step."""
        if key not in self._said and len(self._said) < _MOST_SAID:
            self._said.add(key)
            logger.warning("Gimbal: %s; counted from now on, not logged again", said)


def _place(row: FloatArray) -> tuple[float, float]:
    """Where a row stands among all of its engine."""
    return float(row[Field.EPOCH]), float(row[Field.SEQUENCE])
