"""vLLM's KV cache events, fed to the prefix index where the server publishes them.

With ``--kv-events-config '{"enable_kv_cache_events": true}'`` every engine publishes what its
prefix cache takes in and drops: one ZeroMQ publisher per engine, the port counted up by its DP
rank. The index then knows of evictions, of the answers of earlier turns, and of what other API
servers sent. Without events it knows what this front end dispatched.

A thread receives and decodes; the front end takes the changes up in its own loop (`take`), since
the index belongs to that loop alone. Engines of other hosts are not subscribed to: nobody says
where their publishers listen. Blocks that depend on more than their tokens (LoRA, images, cache
salts) are left out, as they are when a prompt is looked up.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from typing import Any

import msgspec
import zmq

from gimbal.core.dispatch.block_names import BlockNames
from gimbal.core.dispatch.dispatcher import Dispatcher

logger = logging.getLogger("vllm.gimbal")

_POLL_MS = 200
_PENDING = 10_000  # batches; when nobody takes them up the oldest are dropped


class KvEvents:
    """Subscriptions of one front end.

    Args:
        dispatcher: whose prefix index is fed.
        endpoints: index of the engine -> ``tcp://host:port`` of its publisher.
        topic: the publishers' topic.

    Attributes:
        batches: received so far.
        lost: batches that the publishers' numbering says were missed.
        dropped: batches that could not be read or that nobody took up in time.
    """

    def __init__(self, dispatcher: Dispatcher, endpoints: dict[int, str], topic: str = "") -> None:
        from vllm.distributed.kv_events import KVEventBatch

        self.batches = self.lost = self.dropped = 0
        self._dispatcher = dispatcher
        self._decode = msgspec.msgpack.Decoder(KVEventBatch).decode
        self._names = {engine: BlockNames(dispatcher.prefixes) for engine in endpoints}
        self._expected = dict.fromkeys(endpoints, 0)
        self._pending: deque[tuple[int, int, list[Any]]] = deque(maxlen=_PENDING)
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

    def take(self) -> None:
        """Applies what has arrived to the prefix index; called by the index's own loop."""
        while self._pending:
            engine, number, events = self._pending.popleft()
            if engine < self._dispatcher.engines:
                self._apply(engine, number, events)

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
            events = self._decode(payload).events
        except (ValueError, msgspec.DecodeError) as error:
            if not self.dropped:
                logger.warning("Gimbal: KV events of engine %d cannot be read: %s", engine, error)
            self.dropped += 1
            return
        self.batches += 1
        if len(self._pending) == _PENDING:
            self.dropped += 1
        self._pending.append((engine, int.from_bytes(number, "big"), events))

    def _apply(self, engine: int, number: int, events: list[Any]) -> None:
        expected = self._expected[engine]
        self._expected[engine] = number + 1
        if number < expected:  # the engine was started anew
            self._clear(engine)
        self.lost += max(0, number - expected) if expected else 0
        names, index = self._names[engine], self._dispatcher.prefixes
        for event in events:
            kind = type(event).__name__
            if kind == "AllBlocksCleared":
                self._clear(engine)
            elif event.medium not in (None, "GPU") or event.group_idx not in (None, 0):
                continue  # a copy elsewhere, or the same tokens in another layer group
            elif kind == "BlockRemoved":
                index.remove_hashes(names.removed(event.block_hashes), engine)
            elif event.lora_name is None and not any(event.extra_keys or ()):
                stored = names.stored(
                    event.parent_block_hash, event.block_hashes, event.token_ids, event.block_size
                )
                index.insert_hashes(stored, engine)

    def _clear(self, engine: int) -> None:
        self._names[engine].clear()
        self._dispatcher.cache_cleared(engine)


def _subscribe(endpoint: str, topic: str) -> Any:
    socket: Any = zmq.Context.instance().socket(zmq.SUB)
    socket.setsockopt(zmq.LINGER, 0)
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
