"""A paused server (for an update of its weights): no request stays unacknowledged, none is stale.

vLLM 0.32 keeps requests that come during a pause; from 0.33 on engines refuse them (HTTP 503).
"""

from __future__ import annotations

import time
import urllib.error
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from tests.live.client import OUTPUT_TOKENS, burst, call, complete
from tests.live.conftest import operated

pytestmark = pytest.mark.live
REQUESTS, RATE = 80, 20.0


def answer(server: Any, index: int) -> int:
    """Output tokens of one request, or the HTTP status that refused it."""
    try:
        return complete(server, index)
    except urllib.error.HTTPError as error:
        return error.code


def unacknowledged(server: Any) -> int:
    engines = call(f"{server.root}/gimbal/status")["engines"]
    return sum(engine["unacknowledged_tokens"] for engine in engines)


def stale(server: Any) -> float:
    return sum(
        value
        for sample, value in server.metrics().items()
        if sample.startswith("gimbal_dispatch_decisions_total") and 'reason="stale"' in sample
    )


@operated
@pytest.mark.parametrize("mode", ["abort", "wait"])
def test_every_request_around_a_pause_is_acknowledged(server: Any, mode: str) -> None:
    burst(server, 8)
    stale_before = stale(server)
    with ThreadPoolExecutor(REQUESTS + 1) as pool:

        def load() -> list[Future[int]]:
            answers = []
            for index in range(REQUESTS):
                answers.append(pool.submit(answer, server, index))
                time.sleep(1 / RATE)
            return answers

        loading = pool.submit(load)
        time.sleep(0.7)
        call(f"{server.root}/pause?mode={mode}", {})
        answers = loading.result()
        time.sleep(0.7)  # the gauges follow twice a second
        assert call(f"{server.root}/is_paused") == {"is_paused": True}
        assert unacknowledged(server) == 0, "while it is paused"
        time.sleep(2.5)  # engines have said nothing for longer than a signal may be old
        answers += [pool.submit(answer, server, index) for index in range(8)]
        time.sleep(0.7)
        call(f"{server.root}/resume", {})
        got = [one.result() for one in answers]
    assert all(tokens <= OUTPUT_TOKENS or tokens == 503 for tokens in got), got
    assert sum(tokens <= OUTPUT_TOKENS for tokens in got) >= 8, "of those before the pause"
    burst(server, 8)
    time.sleep(0.7)
    assert unacknowledged(server) == 0
    assert stale(server) == stale_before
