"""A node notices that its head has closed every connection, and nothing else."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("psutil")
from gimbal.vllm_plugin.serve import head
from gimbal.vllm_plugin.serve.head import GONE_S, LOOK_S, Head

ADDRESS = "127.0.0.78"


class Node:
    """This process, connected to ADDRESS; `now_s` is its watch's clock."""

    def __init__(self, name: str = ADDRESS) -> None:
        self.now_s = 0.0
        self.watch = Head(name, lambda: self.now_s)

    def after(self, seconds: float) -> bool:
        self.now_s += seconds
        return self.watch.is_gone([os.getpid(), 2**22 + 1])


@pytest.fixture
def connection() -> Iterator[tuple[socket.socket, socket.socket]]:
    with socket.create_server((ADDRESS, 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
        yield near, far
        near.close()
        far.close()


def test_gone_once_the_other_end_has_been_closed_for_long_enough(connection: Any) -> None:
    _, far = connection
    node = Node()
    assert not any(node.after(seconds) for seconds in (0.0, LOOK_S, 10 * GONE_S))
    far.close()
    assert not node.after(LOOK_S)
    assert not node.after(GONE_S - LOOK_S)
    assert node.after(LOOK_S)


def test_one_that_never_was_connected_waits(connection: Any) -> None:
    node = Node("127.0.0.79")
    assert not any(node.after(GONE_S) for _ in range(5))
    assert not Node("no such name.invalid").after(0.0)


def test_it_is_not_looked_for_all_the_time(connection: Any, monkeypatch: Any) -> None:
    node, looks = Node(), []
    monkeypatch.setattr(head, "_peers", lambda pids: looks.append(pids) or {ADDRESS})
    for _ in range(40):
        node.after(LOOK_S / 4)
    assert len(looks) == 10


def test_what_cannot_be_seen_is_not_gone(connection: Any, monkeypatch: Any) -> None:
    node = Node()
    assert not node.after(0.0)
    monkeypatch.setattr(head, "_peers", lambda pids: None)
    assert not any(node.after(2 * GONE_S) for _ in range(3))


def test_an_ipv4_address_may_come_as_ipv6() -> None:
    assert head._plain("::ffff:10.0.0.7") == "10.0.0.7"
    assert head._plain("fe80::1%eth0") == "fe80::1%eth0"
    assert head._plain("10.0.0.7") == "10.0.0.7"
