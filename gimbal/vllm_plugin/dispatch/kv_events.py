"""vLLM's KV cache events, fed to the prefix index where the server publishes them.

With ``--kv-events-config '{"enable_kv_cache_events": true}'`` every engine publishes what its
prefix cache takes in and drops: one ZeroMQ publisher per engine, the port counted up by its DP
rank. The index then knows of evictions, of the answers of earlier turns, and of what other API
servers sent. Without events it knows what this front end dispatched.

A thread receives and decodes; the front end takes the changes up in its own loop (`take`), since
the index belongs to that loop alone, and in slices, since requests wait for that loop. What nobody
has taken up yet is bounded in bytes: the oldest batches go first. Engines of other hosts are not
subscribed to: nobody says where their publishers listen. Blocks that depend on more than their
tokens (LoRA, images, cache salts) are left out, as they are when a prompt is looked up.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import zmq

from gimbal.core.dispatch.block_names import BlockNames
from gimbal.core.dispatch.dispatcher import Dispatcher
from gimbal.core.errors import one_line

logger = logging.getLogger("vllm.gimbal")

_POLL_MS = 200
_PENDING, _PENDING_BYTES = 10_000, 16 << 20
"""Batches, and bytes of them as received, that wait at most. Decoded they take about ten times
that: a token id of one to five bytes becomes a Python int."""
_MESSAGE_BYTES = 64 << 20  # a publisher that sends more is cut off
_SLICE_S = 0.002  # the loop is held for no longer, and then serves requests
_PIECE_TOKENS, _PIECE_BLOCKS = 4096, 1024  # of one event, between two looks at the clock


class KvEvents:
    """Subscriptions of one front end.

    Args:
        dispatcher: whose prefix index is fed.
        endpoints: index of the engine -> ``tcp://host:port`` of its publisher.
        topic: the publishers' topic.
        clock: seconds, for the length of a slice.

    Attributes:
        batches: received so far.
        lost: batches that the publishers' numbering says were missed.
        dropped: batches that could not be read or that nobody took up in time.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        endpoints: dict[int, str],
        topic: str = "",
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        from vllm.distributed.kv_events import KVEventBatch

        self.batches = self.lost = self.dropped = 0
        self._dispatcher = dispatcher
        self._decode = msgspec.msgpack.Decoder(KVEventBatch).decode
        self._names = {engine: BlockNames(dispatcher.prefixes) for engine in endpoints}
        self._expected = dict.fromkeys(endpoints, 0)
        self._clock = clock
        self._lock = threading.Lock()  # over the two below
        self._pending: deque[tuple[int, int, list[Any], int]] = deque()
        self._pending_bytes = 0
        self._pieces = self._work()
        self._scheduled = False
        self._sockets = {_subscribe(e, topic): engine for engine, e in endpoints.items()}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gimbal-kv-events", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread and closes the sockets."""
        self._stop.set()
        self._thread.join()

    def counts(self) -> dict[str, int]:
        """For ``GET /gimbal/status``."""
        return {"batches": self.batches, "lost": self.lost, "dropped": self.dropped}

    def take(self) -> bool:
        """Applies what has arrived to the prefix index; called by the index's own loop.

        For `_SLICE_S` at most: the rest follows once the loop has done what else waits for it.
        Returns whether there may be a rest.
        """
        ends_s = self._clock() + _SLICE_S
        while next(self._pieces):
            if self._clock() >= ends_s:
                self._continue_soon()
                return True
        return False

    def _continue_soon(self) -> None:
        if not self._scheduled:
            with contextlib.suppress(RuntimeError):  # no loop: the next `take` goes on
                asyncio.get_running_loop().call_soon(self._continue)
                self._scheduled = True

    def _continue(self) -> None:
        self._scheduled = False
        self.take()

    def _work(self) -> Iterator[bool]:
        """Does one piece of work per turn and yields True; False when there is none."""
        while True:
            with self._lock:
                batch = self._pending.popleft() if self._pending else None
                self._pending_bytes -= 0 if batch is None else batch[3]
            if batch is None:
                yield False
                continue
            engine, number, events, _ = batch
            try:
                for _ in self._apply(engine, number, events):
                    yield True
            except Exception as error:
                self._cannot_read(engine, error)

    def _run(self) -> None:
        poller = zmq.Poller()
        for socket in self._sockets:
            poller.register(socket, zmq.POLLIN)
        while not self._stop.is_set():
            for socket, _ in poller.poll(_POLL_MS):
                self._receive(self._sockets[socket], socket.recv_multipart())
        for socket in self._sockets:
            socket.close()

    def _receive(self, engine: int, message: list[bytes]) -> None:
        try:
            _, number, payload = message
            if len(number) != 8:
                raise ValueError(f"a number of {len(number)} bytes")
            events = self._decode(payload).events
        except Exception as error:
            self._cannot_read(engine, error)
            return
        self.batches += 1
        with self._lock:
            self._pending.append((engine, int.from_bytes(number, "big"), events, len(payload)))
            self._pending_bytes += len(payload)
            while len(self._pending) > _PENDING or self._pending_bytes > _PENDING_BYTES:
                self._pending_bytes -= self._pending.popleft()[3]
                self.dropped += 1

    def _cannot_read(self, engine: int, error: Exception) -> None:
        if not self.dropped:
            said = one_line(error)
            logger.warning("Gimbal: KV events of engine %d cannot be read: %s", engine, said)
        self.dropped += 1

    def _apply(self, engine: int, number: int, events: list[Any]) -> Iterator[None]:
        """Takes one batch into the index, a piece per turn."""
        yield
        if engine >= self._dispatcher.engines:
            return
        expected = self._expected[engine]
        self._expected[engine] = number + 1
        if number < expected:  # the engine was started anew
            self._clear(engine)
        self.lost += max(0, number - expected) if expected else 0
        for event in events:
            kind = type(event).__name__
            if kind == "AllBlocksCleared":
                self._clear(engine)
                yield
            elif event.medium not in (None, "GPU") or event.group_idx not in (None, 0):
                continue  # a copy elsewhere, or the same tokens in another layer group
            elif kind == "BlockRemoved":
                yield from self._remove(engine, event.block_hashes)
            elif event.lora_name is None and not any(event.extra_keys or ()):
                yield from self._store(engine, event)

    def _store(self, engine: int, event: Any) -> Iterator[None]:
        parent, size = event.parent_block_hash, event.block_size
        blocks = max(1, _PIECE_TOKENS // max(1, size))
        for first in range(0, len(event.block_hashes), blocks):
            hashes = event.block_hashes[first : first + blocks]
            tokens = event.token_ids[first * size : (first + blocks) * size]
            names = self._names[engine].stored(parent, hashes, tokens, size)
            self._dispatcher.prefixes.insert_hashes(names, engine)
            parent = hashes[-1]
            yield

    def _remove(self, engine: int, hashes: list[Any]) -> Iterator[None]:
        for first in range(0, len(hashes), _PIECE_BLOCKS):
            names = self._names[engine].removed(hashes[first : first + _PIECE_BLOCKS])
            self._dispatcher.prefixes.remove_hashes(names, engine)
            yield

    def _clear(self, engine: int) -> None:
        self._names[engine].clear()
        self._dispatcher.cache_cleared(engine)


def _subscribe(endpoint: str, topic: str) -> Any:
    socket: Any = zmq.Context.instance().socket(zmq.SUB)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.MAXMSGSIZE, _MESSAGE_BYTES)
    socket.setsockopt(zmq.SUBSCRIBE, topic.encode())
    socket.connect(endpoint)
    return socket


def endpoints(vllm_config: Any, first: int, engines: int) -> dict[int, str]:
    """Index of the engine -> where its publisher is reached; empty without KV events.

    Args:
        first: DP rank of engine 0.
        engines: this front end's engines; those of other hosts are left out.
    """
    from vllm.distributed.kv_events import ZmqEventPublisher

    config, parallel = vllm_config.kv_events_config, vllm_config.parallel_config
    if config is None or not config.enable_kv_cache_events or config.publisher != "zmq":
        return {}
    if not config.endpoint.startswith("tcp://*:") or config.endpoint.endswith(":0"):
        logger.warning(
            "Gimbal: the prefix index can follow KV events at tcp://*:PORT, not at %s",
            config.endpoint,
        )
        return {}
    local = min(engines, max(1, parallel.data_parallel_size_local))
    base = config.endpoint.replace("*", "127.0.0.1", 1)
    return {
        index: str(ZmqEventPublisher.offset_endpoint_port(base, first + index))
        for index in range(local)
    }
