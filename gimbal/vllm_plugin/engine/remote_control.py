"""Control messages on their way to engines of other hosts, and back the word that they came.

They go over the port that rows come to, against the rows' direction: a subscriber may send its
publishers messages (ZeroMQ, ``zmq_socket(3)``, XSUB and XPUB). An engine calls its front end's
host and never listens, so it takes control from that address alone, and checks it as the front
end did. Every second it says which message it holds; who holds another than the newest is sent
it again. So a link that was down costs a second, and an engine that starts late is told too.
"""

from __future__ import annotations

import logging
import struct
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import zmq

from gimbal.board.control import decoded_control, encoded_control
from gimbal.board.file import Board
from gimbal.board.layout import CONTROL_BYTES
from gimbal.board.wire import bracketed, made_socket
from gimbal.core.config import GimbalConfig, parse_config
from gimbal.core.errors import InputError, one_line
from gimbal.core.queue import ORDERINGS
from gimbal.core.snapshot import MAX_ENGINES

logger = logging.getLogger("vllm.gimbal")

_CONTROL = struct.Struct("<4sQ")  # magic, version; the text follows
_CONTROL_MAGIC = b"GBC1"
_HELD = struct.Struct("<4sHQ")  # magic, engine, version it holds
HELD_MAGIC = b"GBH1"
BEAT_S = 1.0
"""Between two times that an engine says which message it holds."""
REPEAT_S = 0.5
"""Between two times that one message is sent, whoever lacks it."""
CLOSE_S = 2.0
_PAUSE_S = 0.05


def control_message(version: int, values: Mapping[str, Any]) -> bytes:
    """Control as it travels. Raises ValueError as `encoded_control`."""
    return _CONTROL.pack(_CONTROL_MAGIC, version) + encoded_control(dict(values))


def parse_control(message: bytes, config: GimbalConfig) -> tuple[int, dict[str, Any]]:
    """Version and values of a control message that an engine of `config` can follow.

    Raises InputError saying what is wrong.
    """
    size = len(message) - _CONTROL.size
    if not message.startswith(_CONTROL_MAGIC) or not 0 < size <= CONTROL_BYTES:
        raise InputError(f"control: {len(message)} bytes that are no control message")
    version = _CONTROL.unpack_from(message)[1]
    text = message[_CONTROL.size :]
    values = decoded_control(text)
    if not values and text != b"{}":
        raise InputError("control: no JSON object")
    levels, queue = values.get("levels", []), values.get("queue", {})
    if not isinstance(levels, list) or not isinstance(queue, dict):
        raise InputError("control: levels are no list, or queue is no mapping")
    own = config.queue
    name = values.get("ordering", own.ordering)
    options = queue.get("options", own.options if name == own.ordering else {})
    if not isinstance(options, dict):
        raise InputError("control: queue.options are no mapping")
    parse_config({"queue": {k: v for k, v in queue.items() if k != "options"}}, "control")
    ORDERINGS.check(name, options, "control", "ordering", "queue.options")
    return version, values


def parse_held(message: bytes) -> tuple[int, int]:
    """The engine and the version it holds. Raises ValueError for what no engine says."""
    if len(message) != _HELD.size:
        raise ValueError(f"{len(message)} bytes that do not say which control an engine holds")
    _, engine, version = _HELD.unpack(message)
    if engine >= MAX_ENGINES:
        raise ValueError(f"engine {engine}: a board holds {MAX_ENGINES} engines")
    return engine, version


class ControlSender:
    """The front end's side: called by the thread that takes in rows, and by no other.

    Args:
        board: has the control; is told who holds which.
        send: hands a message to all engines of other hosts.
        clock: seconds that only go on.
    """

    def __init__(
        self,
        board: Board,
        send: Callable[[bytes], Any],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._board = board
        self._send = send
        self._clock = clock
        self._sent = 0
        self._next_s = 0.0

    def look(self) -> None:
        """Sends a message that has not been sent yet."""
        if self._board.control_version() != self._sent:
            self._tell()

    def heard(self, engine: int, version: int) -> None:
        """Takes up that `engine` holds message `version`, and sends the newest where it differs."""
        newest = self._board.control_version()
        # One that has not been made is of another server, or of a board that is gone.
        self._board.hold(engine, version if version <= newest else 0)
        if version != newest and self._clock() >= self._next_s:
            self._tell()

    def _tell(self) -> None:
        version = self._board.control_version()
        self._sent, self._next_s = version, self._clock() + REPEAT_S
        if version:
            self._send(control_message(version, self._board.read_control()))


class RemoteControl:
    """The engine's side: what a board is to the engines of its own host.

    A thread takes messages in; the queue level reads the last one before its next step.

    Args:
        address: ``tcp://host:port`` where the front end awaits rows.
        engine: DP rank.
        config: the engine's own, which messages are checked against.

    Attributes:
        generation: as `Board.generation`; there is no file here that could be replaced.
        refused: messages that this engine cannot follow.
    """

    generation = 0

    def __init__(self, address: str, engine: int, config: GimbalConfig) -> None:
        self.refused = 0
        self._engine = engine
        self._config = config
        self._control: tuple[int, dict[str, Any]] = (0, {})
        self._said: set[str] = set()
        self._socket = made_socket(zmq.XPUB, address)
        self._socket.setsockopt(zmq.SNDHWM, 4)
        self._socket.setsockopt(zmq.RCVHWM, 16)
        self._socket.connect(bracketed(address))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gimbal-control", daemon=True)
        self._thread.start()

    def control_version(self) -> int:
        """Number of the last message that this engine can follow; 0 before the first."""
        return self._control[0]

    def read_control(self) -> dict[str, Any]:
        """That message."""
        return self._control[1]

    def close(self) -> None:
        """Ends the thread, which closes the socket; waits `CLOSE_S` at most."""
        self._stop.set()
        self._thread.join(CLOSE_S)

    def _run(self) -> None:
        next_beat_s = 0.0
        while not self._stop.is_set():
            try:
                now_s = time.monotonic()
                if now_s >= next_beat_s:
                    next_beat_s = now_s + BEAT_S
                    self._say_what_is_held()
                if self._socket.poll(1e3 * min(max(next_beat_s - now_s, 0.0), 0.2)):
                    self._take(self._socket.recv(zmq.NOBLOCK))
            except zmq.ContextTerminated:  # the process ends, and waits for this socket
                break
            except Exception as error:
                self._warn(f"control of the front end's host: {one_line(error)}")
                self._stop.wait(_PAUSE_S)
        self._socket.close()

    def _say_what_is_held(self) -> None:
        self._socket.send(_HELD.pack(HELD_MAGIC, self._engine, self._control[0]), zmq.NOBLOCK)

    def _take(self, message: bytes) -> None:
        if message[:1] in (b"\0", b"\1"):
            return  # a subscription: the front end's host is there
        try:
            control = parse_control(message, self._config)
        except InputError as error:
            self.refused += 1
            self._warn(f"engine {self._engine} keeps to the control before: {error}")
            return
        if control[0] != self._control[0]:
            self._control = control
        self._say_what_is_held()

    def _warn(self, said: str) -> None:
        """Each trouble once, and a few at most: the same message comes again and again."""
        if said not in self._said and len(self._said) < 8:
            self._said.add(said)
            logger.warning("Gimbal: %s", said)
