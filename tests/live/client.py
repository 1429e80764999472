"""HTTP to a running demo server, and the requests that live tests load it with."""

from __future__ import annotations

import json
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

OUTPUT_TOKENS = 12


def call(url: str, body: dict[str, Any] | None = None) -> Any:
    """The JSON that `url` answers; with a `body` it is a POST."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as reply:
        return json.load(reply)


def complete(server: Any, index: int) -> int:
    """Output tokens of one request; every fourth prompt is long."""
    body = {
        "model": server.model,
        "prompt": f"{index} " + "word " * (120 if index % 4 == 0 else 6),
        "max_tokens": OUTPUT_TOKENS,
        "ignore_eos": True,
    }
    return int(call(f"{server.url}/completions", body)["usage"]["completion_tokens"])


def burst(server: Any, requests: int, rate: float | None = None, meanwhile: Any = None) -> None:
    """Sends `requests`, at `rate` per second or at once; every one must come back whole."""
    with ThreadPoolExecutor(32) as pool:
        answers = []
        other = pool.submit(meanwhile) if meanwhile is not None else None
        for index in range(requests):
            answers.append(pool.submit(complete, server, index))
            if rate is not None:
                time.sleep(1 / rate)
        tokens = [answer.result() for answer in answers]
        assert tokens == [OUTPUT_TOKENS] * requests, tokens
        if other is not None:
            other.result()
