"""What a front end learns of the engines' caches, and what a client learns of its engine."""

from __future__ import annotations

import json
import random
import socket
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.live


def two_free_ports() -> int:
    """The first of two neighbouring ports that nobody uses.

    Below those that the system gives to whoever asks for any: vLLM's processes ask for many before
    the second engine binds its own.
    """
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = random.randrange(lowest // 2, lowest - 1)
        with socket.socket() as first, socket.socket() as second:
            try:
                first.bind(("", port))
                second.bind(("", port + 1))
            except OSError:
                continue
            return port


FLAGS = (
    *("--additional-config", '{"gimbal": {"admin": true}}'),
    "--kv-events-config",
    json.dumps({"enable_kv_cache_events": True, "endpoint": f"tcp://*:{two_free_ports()}"}),
)


def engine_of(
    server: Any, prompt: str, headers: dict[str, str] | None = None, **fields: Any
) -> int:
    """Sends one request; the engine its response names."""
    body = {"model": server.model, "prompt": prompt, "max_tokens": 4, "stream": True} | fields
    headers = {"Content-Type": "application/json"} | (headers or {})
    request = urllib.request.Request(
        f"{server.url}/completions", json.dumps(body).encode(), headers
    )
    with urllib.request.urlopen(request, timeout=120) as reply:
        reply.read()
        return int(reply.headers["x-gimbal-engine"])


def kv_events(server: Any) -> dict[str, int]:
    with urllib.request.urlopen(f"{server.root}/gimbal/status", timeout=30) as reply:
        found: dict[str, int] = json.load(reply)["dispatch"]["kv_events"]
    return found


@pytest.mark.server(*FLAGS)
def test_the_prefix_index_hears_of_both_engines(server: Any) -> None:
    engines = {engine_of(server, f"{index} " + "word " * 400) for index in range(4)}
    assert engines == {0, 1}
    deadline = time.monotonic() + 60
    while kv_events(server)["batches"] < 4 and time.monotonic() < deadline:
        time.sleep(0.2)
    counts = kv_events(server)
    assert counts["batches"] >= 4
    assert counts["lost"] == counts["dropped"] == 0


@pytest.mark.server(*FLAGS)
def test_requests_of_one_user_stay_on_one_engine(server: Any) -> None:
    homes = {"ann": 0, "bob": 1}
    for user, rank in homes.items():
        headers = {"X-data-parallel-rank": str(rank)}
        assert engine_of(server, f"{user} " + "word " * 400, headers, user=user) == rank
    for index in range(6):
        user = ("ann", "bob")[index % 2]
        assert engine_of(server, f"{index} " + "word " * 400, user=user) == homes[user]
