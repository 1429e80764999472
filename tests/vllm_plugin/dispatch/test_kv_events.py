"""KV events from publishers as vLLM's engines run them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from gimbal.core.config import DispatchConfig
from gimbal.core.dispatch.block_names import BlockNames
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

from gimbal.vllm_plugin.dispatch import kv_events
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
    engines.events._receive(0, [b"", b"\0" * 5000, msgspec.msgpack.encode(KVEventBatch(0.0, []))])
    assert engines.events.dropped == 3


def message(number: int, *events: Any) -> list[bytes]:
    """As a publisher sends it."""
    payload = msgspec.msgpack.encode(KVEventBatch(ts=0.0, events=list(events)))
    return [b"", number.to_bytes(8, "big"), payload]


class Clock:
    """Each look takes a quarter of a slice."""

    def __init__(self) -> None:
        self.looks = 0

    def __call__(self) -> float:
        self.looks += 1
        return self.looks * kv_events._SLICE_S / 4


def quiet(clock: Callable[[], float] = lambda: 0.0) -> KvEvents:
    """Events of one engine without sockets."""
    events = KvEvents(Dispatcher(1, DispatchConfig()), {}, clock=clock)
    events.close()
    events._names[0] = BlockNames(events._dispatcher.prefixes)
    events._expected[0] = 0
    return events


def test_ten_thousand_pending_batches_leave_the_loop_to_others() -> None:
    events = quiet(clock=Clock())
    for number in range(10_000):
        events._receive(0, message(number, BlockRemoved(block_hashes=[number], medium="GPU")))
    assert len(events._pending) == 10_000
    events.take()
    assert 9_990 < len(events._pending) < 10_000, "without a loop the next call goes on"

    turns = 0

    async def serve() -> None:
        nonlocal turns
        events.take()
        events.take()
        while events._scheduled:
            turns += 1
            before = len(events._pending)
            await asyncio.sleep(0)
            assert before - len(events._pending) <= 8, "one slice per turn of the loop"

    asyncio.run(serve())
    assert turns > 2000
    assert not events._pending
    assert events._pending_bytes == 0
    assert events.lost == events.dropped == 0


def test_one_long_event_is_taken_in_slices_and_whole() -> None:
    events = quiet(clock=Clock())
    tokens = list(range(100_000))
    hashes = list(range(100_000 // 16))
    event = BlockStored(
        block_hashes=hashes,
        parent_block_hash=None,
        token_ids=tokens,
        block_size=16,
        lora_id=None,
        medium="GPU",
        lora_name=None,
    )
    events._receive(0, message(0, event))
    takes = 1
    while events.take():
        takes += 1
    assert takes > 5
    prefixes = events._dispatcher.prefixes
    assert prefixes.match(tokens).longest > 99_000
    events._receive(0, message(1, BlockRemoved(block_hashes=hashes[:0:-1], medium="GPU")))
    while events.take():
        pass
    assert prefixes.match(tokens).cached_tokens.tolist() == [0]


def test_what_waits_is_bounded_in_bytes() -> None:
    events = quiet()
    event = stored(0, 4, session_id="s" * 1_000_000)
    for number in range(100):
        events._receive(0, message(number, event))
    assert events._pending_bytes <= kv_events._PENDING_BYTES
    assert len(events._pending) + events.dropped == 100
    assert events._pending[-1][1] == 99, "the oldest go first"
    events.take()
    assert events._pending_bytes == 0


def test_a_batch_that_makes_no_sense_is_counted_and_the_next_is_taken() -> None:
    events = quiet()
    senseless = stored(0, 4)
    senseless.token_ids[5], senseless.block_size = 1 << 40, 40
    events._receive(0, message(0, senseless))
    events._receive(0, message(1, stored(0, 4)))
    events.take()
    assert events.dropped == 1
    assert events._dispatcher.prefixes.match([*TOKENS, 1]).longest == 256


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
