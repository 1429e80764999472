"""What a front end learns of the engines' caches, and what a client learns of its engine."""

from __future__ import annotations

import json
import time
import urllib.request
from typing import Any

import pytest

from tests.live.conftest import operated

pytestmark = pytest.mark.live


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


@operated
def test_the_prefix_index_hears_of_both_engines(server: Any) -> None:
    engines = {engine_of(server, f"{index} " + "word " * 400) for index in range(4)}
    assert engines == {0, 1}
    deadline = time.monotonic() + 60
    while kv_events(server)["batches"] < 4 and time.monotonic() < deadline:
        time.sleep(0.2)
    counts = kv_events(server)
    assert counts["batches"] >= 4
    assert counts["lost"] == counts["dropped"] == 0


@operated
def test_requests_of_one_user_stay_on_one_engine(server: Any) -> None:
    homes = {"ann": 0, "bob": 1}
    for user, rank in homes.items():
        headers = {"X-data-parallel-rank": str(rank)}
        assert engine_of(server, f"{user} " + "word " * 400, headers, user=user) == rank
    for index in range(6):
        user = ("ann", "bob")[index % 2]
        assert engine_of(server, f"{index} " + "word " * 400, user=user) == homes[user]
