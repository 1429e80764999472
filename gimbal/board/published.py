"""Rows for anybody: what an engine publishes beside its board, and the message that carries it.

A row names its server as well as its rank, says how old it was when it left, and is signed where
there is a secret: HMAC-SHA256 over the whole message. Rows hold counts and times, no prompt and no
request, so they are signed and not encrypted. ZeroMQ's own CURVE would encrypt them too, but a
peer with another key is then a connection that never comes about, and nobody can say why.
"""

from __future__ import annotations

import hmac
import logging
import struct
import threading
from collections.abc import Sequence
from typing import NamedTuple

import zmq

from gimbal.board.clock import now_us
from gimbal.board.wire import RefusedRow, made_socket, row_in
from gimbal.core.contracts import FloatArray
from gimbal.core.endpoints import MOST_NAME_BYTES, Endpoint
from gimbal.core.errors import one_line
from gimbal.core.snapshot import MAX_ENGINES, ROW_WIDTH

logger = logging.getLogger("vllm.gimbal")

BEAT_S = 0.25
"""An engine that has nothing to say repeats its last row this often: for who came since, and to
show that its process lives."""
CLOSE_S = 2.0

_HEAD = struct.Struct("<4sHHBBQ")
"""Magic, rank, row width, bytes of the name and of the signature, age in microseconds; then name,
row and signature."""
_MAGIC = b"GBP1"
_SIGNATURE_BYTES = 32


class Source(NamedTuple):
    """Whose a row is: the name of its server, and the DP rank of its engine there."""

    name: str
    rank: int

    def __str__(self) -> str:
        return f"engine {self.rank} of {self.name}"


def packed(source: Source, row: FloatArray, age_us: float, secret: bytes | None) -> bytes:
    """The message that carries `row` [ROW_WIDTH], taken `age_us` ago."""
    name = source.name.encode()
    size = 0 if secret is None else _SIGNATURE_BYTES
    age = max(0, int(age_us))
    head = _HEAD.pack(_MAGIC, source.rank, ROW_WIDTH, len(name), size, age)
    message = b"".join((head, name, row.tobytes()))
    return message if secret is None else message + _signature(message, secret)


def unpacked(message: bytes, secret: bytes | None) -> tuple[Source, FloatArray, float]:
    """Whose row it is, the row [ROW_WIDTH], and its age in microseconds when it was sent.

    Raises RefusedRow for what is no row, or is not signed as `secret` asks.
    """
    if len(message) < _HEAD.size or not message.startswith(_MAGIC):
        raise RefusedRow(-1, "message", f"{len(message)} bytes that are no published row")
    _, rank, width, named, signed, age_us = _HEAD.unpack_from(message)
    start, end = _HEAD.size + named, len(message) - signed
    if signed not in (0, _SIGNATURE_BYTES) or end < start:
        raise RefusedRow(-1, "message", f"{len(message)} bytes that are no published row")
    _check_signature(message[:end], message[end:], secret)
    try:
        name = message[_HEAD.size : start].decode()
    except UnicodeDecodeError:
        name = ""
    if not name or not name.isprintable() or named > MOST_NAME_BYTES:
        raise RefusedRow(-1, "message", "a row whose server has no name")
    if rank >= MAX_ENGINES:
        raise RefusedRow(-1, "engine", f"{name}: rank {rank}, at most {MAX_ENGINES - 1}")
    source = Source(name, rank)
    return source, row_in(message[start:end], width, rank, str(source)), float(age_us)


def _signature(message: bytes, secret: bytes) -> bytes:
    return hmac.digest(secret, message, "sha256")


def _check_signature(message: bytes, signature: bytes, secret: bytes | None) -> None:
    if secret is None:
        if signature:
            raise RefusedRow(-1, "signature", "a signed row, and there is no secret here")
        return
    if not signature:
        raise RefusedRow(-1, "signature", "a row that is not signed")
    if not hmac.compare_digest(signature, _signature(message, secret)):
        raise RefusedRow(-1, "signature", "a row that is signed with another secret")


class RowPublisher:
    """Hands an engine's rows to whoever subscribes; a row that nobody takes is dropped.

    Args:
        endpoints: where subscribers are called, or listened for at `Endpoint.for_rank`.
        source: whose rows they are.
        secret: signs them; None leaves them unsigned.

    Attributes:
        addresses: what it listens on, as ZeroMQ has it.
        failures: rows that could not be sent.

    Raises zmq.ZMQError that names the address where it cannot listen, InputError as `for_rank`.
    """

    def __init__(
        self, endpoints: Sequence[Endpoint], source: Source, secret: bytes | None = None
    ) -> None:
        self.failures = 0
        self.addresses: list[str] = []
        self._source = source
        self._secret = secret
        self._last: tuple[FloatArray, float] | None = None
        self._sent_us = 0.0
        own = [endpoint.for_rank(source.rank) for endpoint in endpoints]
        self._socket = made_socket(zmq.PUB, *(endpoint.address for endpoint in own))
        self._socket.setsockopt(zmq.SNDHWM, 16)
        for endpoint in own:
            self._open(endpoint)
        # The engine's thread and that of the beat take turns at the socket.
        self._turn = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gimbal-publisher", daemon=True)
        self._thread.start()

    def _open(self, endpoint: Endpoint) -> None:
        try:
            if endpoint.bound:
                self._socket.bind(endpoint.address)
                self.addresses.append(self._socket.getsockopt(zmq.LAST_ENDPOINT).decode())
            else:
                self._socket.connect(endpoint.address)
        except zmq.ZMQError as error:
            self._socket.close()
            raise zmq.ZMQError(error.errno, f"{endpoint.address}: {error.strerror}") from None

    def publish(self, row: FloatArray, taken_us: float) -> None:
        """Sends a copy of `row` [ROW_WIDTH]; never waits for a subscriber, never raises.

        Args:
            taken_us: when it was taken, by the host's clock (`board.clock`).
        """
        with self._turn:
            self._last = row.copy(), taken_us
            self._send(taken_us)

    def close(self) -> None:
        """Ends the thread, waits `CLOSE_S` for it at most, and closes the socket."""
        self._stop.set()
        self._thread.join(CLOSE_S)
        with self._turn:
            self._last = None
            self._socket.close()

    def _run(self) -> None:
        while not self._stop.wait(BEAT_S):
            with self._turn:
                now = now_us()
                if now - self._sent_us >= BEAT_S * 1e6 / 2:
                    self._send(now)

    def _send(self, now: float) -> None:
        if self._last is None:
            return
        row, taken_us = self._last
        self._sent_us = now
        try:
            self._socket.send(packed(self._source, row, now - taken_us, self._secret), zmq.NOBLOCK)
        except zmq.ZMQError as error:
            self.failures += 1
            if self.failures == 1:
                logger.warning("Gimbal: %s cannot publish: %s", self._source, one_line(error))
