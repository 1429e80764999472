"""Orderings that answer nonsense: the heap names them and stays as it was."""

import pytest

from gimbal.core.contracts import OrderingTraits, QueuedRequest, QueueState
from gimbal.core.errors import PolicyError
from gimbal.core.queue.fcfs import FcfsOrdering
from gimbal.core.queue.heap import WaitingHeap

NAN, INF = float("nan"), float("inf")
STATE = QueueState(1.0, 100.0, 3, 30)


class Keyed:
    """Answers what it was told to."""

    traits = OrderingTraits(dynamic=True)

    def __init__(self, key=0.0, keys=None):
        self._key, self._keys = key, keys

    def key(self, request, state):
        if isinstance(self._key, Exception):
            raise self._key
        return self._key

    def keys(self, requests, state):
        if isinstance(self._keys, Exception):
            raise self._keys
        return self._keys


def three(ordering=None):
    heap = WaitingHeap(ordering or FcfsOrdering())
    for index in range(3):
        state = QueueState(float(index), 100.0, index, 0)
        heap.add(QueuedRequest(f"r{index}", float(index), 10), index, state)
    return heap


BAD_KEYS = [
    (NAN, "key of a request is nan, expected a number"),
    (None, "TypeError"),
    ("7", "TypeError"),
    (1j, "TypeError"),
    (RuntimeError("no\nidea"), "RuntimeError: no idea"),
]


@pytest.mark.parametrize(("key", "message"), BAD_KEYS)
def test_a_request_without_a_key_is_not_queued(key, message):
    heap = WaitingHeap(Keyed(key))
    with pytest.raises(PolicyError) as error:
        heap.add(QueuedRequest("r", 0.0, 10), "", STATE)
    assert str(error.value).startswith(f"queue ordering {Keyed.__module__}:Keyed: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert len(heap) == heap.waiting_tokens == 0


@pytest.mark.parametrize(("key", "message"), BAD_KEYS)
def test_a_change_to_an_ordering_without_keys_changes_nothing(key, message):
    heap = three()
    ordering = heap.ordering
    with pytest.raises(PolicyError, match="Keyed"):
        heap.reorder(Keyed(key), STATE, 5.0)
    assert heap.ordering is ordering
    assert (heap.max_wait_s, heap.epoch, heap.is_dynamic) == (None, 0, False)
    assert [heap.pop(9.0).item for _ in range(3)] == [0, 1, 2]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ([0.0, NAN, 1.0], "a key is NaN"),
        ([0.0, 1.0], "2 keys for 3 requests"),
        ([], "0 keys for 3 requests"),
        ([0.0] * 4, "4 keys for 3 requests"),
        (7, "TypeError"),
        ([0.0, None, 1.0], "TypeError"),
        (RuntimeError("no idea"), "RuntimeError: no idea"),
    ],
)
def test_bad_keys_of_a_dynamic_ordering(keys, message):
    heap = three(Keyed(0.0, keys))
    with pytest.raises(PolicyError, match=f"Keyed: .*{message}"):
        heap.refresh(STATE)
    assert [heap.pop(9.0).item for _ in range(3)] == [0, 1, 2]


def test_infinite_keys_are_numbers():
    heap = three(Keyed(0.0, [INF, 0.0, -INF]))
    heap.refresh(STATE)
    assert [heap.pop(9.0).item for _ in range(3)] == [2, 1, 0]
