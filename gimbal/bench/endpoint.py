"""The control side of a server under test: health, model, counters, run-time switches."""

from __future__ import annotations

import json
import os
import re
import time
import urllib.error
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any

from gimbal.core.errors import InputError, one_line
from gimbal.core.numbers import whole
from gimbal.core.web import open_url

COUNTERS = (
    "vllm:request_success_total",
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:prefix_cache_queries_total",
    "vllm:prefix_cache_hits_total",
    "vllm:num_preemptions_total",
)
"""vLLM's own counters that a run's difference is taken of, by ``engine`` label."""
BUSY = ("vllm:num_requests_running", "vllm:num_requests_waiting")
_SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*)\{(.*)\} (\S+)$")
_ENGINE = re.compile(r'(?:^|,)engine="(\d+)"')

Counters = dict[str, dict[int, float]]


def authorization() -> dict[str, str]:
    """The header a server with an API key wants: the key in ``VLLM_API_KEY`` or, without it,
    ``OPENAI_API_KEY``."""
    key = os.environ.get("VLLM_API_KEY") or os.environ.get("OPENAI_API_KEY")
    return {"Authorization": f"Bearer {key}"} if key else {}


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What ``/v1/models`` says: the name to ask for, where it came from, its context length."""

    name: str
    root: str
    max_model_len: int | None


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A server by its root URL. Requests time out after `timeout_s`."""

    url: str
    timeout_s: float = 10.0

    def _call(self, path: str, payload: Mapping[str, Any] | None = None) -> bytes:
        data = None if payload is None else json.dumps(payload).encode()
        headers = {"Content-Type": "application/json"} | authorization()
        with open_url(self.url.rstrip("/") + path, self.timeout_s, data, headers) as response:
            body: bytes = response.read()
        return body

    def healthy(self) -> bool:
        """Whether ``/health`` answers."""
        try:
            self._call("/health")
        except (OSError, ValueError, HTTPException):
            return False
        return True

    def model(self) -> ServedModel:
        """The first served model; raises InputError when the server cannot be asked."""
        try:
            model = json.loads(self._call("/v1/models"))["data"][0]
            length = model.get("max_model_len")
            return ServedModel(
                str(model["id"]),
                str(model.get("root") or ""),
                None if length is None else whole(length, "max_model_len=", 1),
            )
        except (
            OSError, ValueError, LookupError, TypeError, AttributeError, HTTPException
        ) as error:  # fmt: skip
            what = one_line(error)
            raise InputError(f"--url {self.url}: no OpenAI server answers there: {what}") from None

    def counters(self, names: tuple[str, ...] = COUNTERS) -> Counters:
        """Values of `names` by engine, summed over other labels; empty when there are none."""
        try:
            text = self._call("/metrics").decode()
        except (OSError, ValueError, HTTPException):
            return {}
        found: Counters = defaultdict(lambda: defaultdict(float))
        for line in text.splitlines():
            match = _SAMPLE.match(line)
            if match is None or match.group(1) not in names:
                continue
            engine = _ENGINE.search(match.group(2))
            if engine is not None:
                found[match.group(1)][int(engine.group(1))] += float(match.group(3))
        return {name: dict(by_engine) for name, by_engine in found.items()}

    def wait_idle(self, limit_s: float = 60.0) -> bool:
        """Waits until no request runs or waits; False when `limit_s` is over first."""
        end = time.monotonic() + limit_s
        while time.monotonic() < end:
            busy = self.counters(BUSY)
            if not any(value for engines in busy.values() for value in engines.values()):
                return True
            time.sleep(0.2)
        return False

    def switch(self, settings: Mapping[str, Any]) -> None:
        """``POST /gimbal/control``; raises InputError when the server, or an engine of another
        host, cannot be switched."""
        try:
            answer = self._call("/gimbal/control", settings)
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace")[:200].replace("\n", " ")
            raise InputError(
                f"{self.url}/gimbal/control: HTTP {error.code}: {text}; arms share a server only "
                "with Gimbal's `admin: true`; try --no-share"
            ) from None
        except (OSError, HTTPException) as error:
            raise InputError(f"{self.url}/gimbal/control: {one_line(error)}") from None
        left = _not_followed(answer)
        if left:
            raise InputError(
                f"{self.url}/gimbal/control: engines that did not follow: {left}; without them "
                "an arm would measure two settings at once"
            )


def _not_followed(answer: bytes) -> str:
    """Ranks of the engines that an answer of the control route says are behind, as text."""
    try:
        document = json.loads(answer)
    except (ValueError, RecursionError):
        return ""
    left = document.get("not_followed") if isinstance(document, dict) else None
    return one_line(", ".join(map(str, left))) if left and isinstance(left, list) else ""


def counter_differences(before: Counters, after: Counters) -> Counters:
    """after - before, by counter and engine."""
    return {
        name: {
            engine: value - before.get(name, {}).get(engine, 0.0)
            for engine, value in engines.items()
        }
        for name, engines in after.items()
    }
