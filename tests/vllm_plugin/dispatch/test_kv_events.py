"""KV events from publishers as vLLM's engines run them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from gimbal.core.config import DispatchConfig
from gimbal.core.dispatch.dispatcher import Dispatcher

pytest.importorskip("vllm")
from vllm.config.kv_events import KVEventsConfig
from vllm.distributed.kv_events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    EventPublisherFactory,
    KVEventBatch,
)

from gimbal.vllm_plugin.dispatch.kv_events import KvEvents, endpoints

TOKENS = list(range(256))


def stored(first: int, blocks: int, parent: int | None = None, **fields: Any) -> BlockStored:
    """Blocks of 64 tokens, named by their number, of the prompt `TOKENS`."""
    names = list(range(first, first + blocks))
    tokens = TOKENS[64 * first : 64 * (first + blocks)]
    values: dict[str, Any] = {"lora_id": None, "medium": "GPU", "lora_name": None} | fields
    return BlockStored(
        block_hashes=names, parent_block_hash=parent, token_ids=tokens, block_size=64, **values
    )


class Engines:
    """Two publishers on ports of their own choice, and a subscription to both."""

    def __init__(self) -> None:
        config = KVEventsConfig(enable_kv_cache_events=True, endpoint="tcp://*:0")
        self.publishers = [EventPublisherFactory.create(config, rank) for rank in range(2)]
        self.dispatcher = Dispatcher(2, DispatchConfig())
        ports = [p.get_publisher_config().endpoint for p in self.publishers]
        self.events = KvEvents(self.dispatcher, dict(enumerate(ports)))
        self.until(lambda: self.greeted(), self.greet)

    def greet(self) -> None:
        """A subscription takes a moment; what is published before is lost."""
        for publisher in self.publishers:
            publisher.publish(KVEventBatch(ts=0.0, events=[]))

    def greeted(self) -> bool:
        return all(self.events._expected.values())

    def until(self, condition: Callable[[], bool], act: Callable[[], None] | None = None) -> None:
        deadline = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < deadline, "events did not arrive"
            if act is not None:
                act()
            time.sleep(0.01)
            self.events.take()

    def send(self, engine: int, *events: Any) -> None:
        before = self.events.batches
        self.publishers[engine].publish(KVEventBatch(ts=0.0, events=list(events)))
        self.until(lambda: self.events.batches > before)
        self.events.take()

    def cached(self) -> list[float]:
        cached: list[float] = self.dispatcher.prefixes.match([*TOKENS, 1]).cached_tokens.tolist()
        return cached

    def close(self) -> None:
        self.events.close()
        for publisher in self.publishers:
            publisher.shutdown()


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> Iterator[Engines]:
    monkeypatch.setenv("VLLM_HOST_IP", "127.0.0.1")
    both = Engines()
    # Greetings still under way would be taken for the answer to what a test sends.
    count = -1
    while count != both.events.batches:
        count = both.events.batches
        time.sleep(0.1)
    yield both
    both.close()


def test_index_follows_what_an_engine_stores_and_removes(engines: Engines) -> None:
    engines.send(1, stored(0, 3))
    assert engines.cached() == [0, 192]
    engines.send(0, stored(0, 1))
    engines.send(0, stored(1, 3, parent=0))
    assert engines.cached() == [256, 192]
    engines.send(1, BlockRemoved(block_hashes=[2, 1], medium="GPU"))
    assert engines.cached() == [256, 64]
    engines.send(0, AllBlocksCleared())
    assert engines.cached() == [0, 64]
    assert engines.events.lost == engines.events.dropped == 0


def test_an_eviction_takes_back_what_dispatch_entered(engines: Engines) -> None:
    engines.dispatcher.prefixes.insert(TOKENS, 0)
    assert engines.cached() == [256, 0]
    engines.send(0, stored(0, 4))
    engines.send(0, BlockRemoved(block_hashes=[3], medium="GPU"))
    assert engines.cached() == [192, 0]


@pytest.mark.parametrize(
    "fields",
    [{"medium": "CPU"}, {"lora_name": "a"}, {"extra_keys": [("salt",), None]}, {"group_idx": 1}],
)
def test_blocks_that_say_nothing_about_plain_prompts_are_left_out(
    engines: Engines, fields: dict[str, Any]
) -> None:
    engines.send(0, stored(0, 2, **fields))
    assert engines.cached() == [0, 0]


def test_unreadable_messages_are_counted(engines: Engines) -> None:
    engines.events._receive(0, [b"", b"\0" * 8, b"not msgpack"])
    engines.events._receive(0, [b"too short"])
    assert engines.events.dropped == 2


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (None, {}),
        (KVEventsConfig(), {}),
        (
            KVEventsConfig(enable_kv_cache_events=True),
            {0: "tcp://127.0.0.1:5559", 1: "tcp://127.0.0.1:5560"},
        ),
        (KVEventsConfig(enable_kv_cache_events=True, endpoint="tcp://collector:5557"), {}),
        (KVEventsConfig(enable_kv_cache_events=True, endpoint="tcp://*:0"), {}),
    ],
)
def test_endpoints_of_this_hosts_engines(
    config: KVEventsConfig | None, expected: dict[int, str]
) -> None:
    parallel = SimpleNamespace(data_parallel_size_local=2)
    vllm_config = SimpleNamespace(kv_events_config=config, parallel_config=parallel)
    assert endpoints(vllm_config, first=2, engines=4) == expected
