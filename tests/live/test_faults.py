"""A server whose own functions fail: requests come back whole, and every level can end."""

from __future__ import annotations

import json
import os
import tempfile
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.live

FOLDERS = [str(Path(__file__).with_name(name)) for name in ("inject_faults", "on_import")]
FAULTS = Path(tempfile.gettempdir()) / f"gimbal-live-faults-{os.getuid()}"
EPLB = {"window_size": 30, "step_interval": 40, "communicator": "torch_gloo"}
ENVIRONMENT = {
    "PYTHONPATH": os.pathsep.join(filter(None, (*FOLDERS, os.environ.get("PYTHONPATH")))),
    "FAULTS_FILE": str(FAULTS),
    "FAULTS_SEED": "7",
}
COUNTED = ("queue_fallbacks", "placement_fallbacks", "signal_fallbacks")
OUTPUT_TOKENS = 8


@pytest.fixture(autouse=True)
def no_faults() -> Iterator[None]:
    FAULTS.unlink(missing_ok=True)
    yield
    FAULTS.unlink(missing_ok=True)


def call(url: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=240) as reply:
        return json.load(reply)


def burst(server: Any, requests: int) -> None:
    """Sends `requests`, 32 at a time; every one must come back whole."""

    def complete(index: int) -> int:
        body = {
            "model": server.model,
            "prompt": f"{index} " + "word " * (60 if index % 8 == 0 else 6),
            "max_tokens": OUTPUT_TOKENS,
            "ignore_eos": True,
            "user": f"user {index % 20}",
        }
        return int(call(f"{server.url}/completions", body)["usage"]["completion_tokens"])

    with ThreadPoolExecutor(32) as pool:
        assert list(pool.map(complete, range(requests))) == [OUTPUT_TOKENS] * requests


def counted(status: Any) -> dict[str, float]:
    """Fallbacks by level, of all engines and this front end."""
    found = {name: sum(engine[name] for engine in status["engines"]) for name in COUNTED}
    return found | {"dispatch": sum(status["dispatch"]["fallbacks"].values())}


@pytest.mark.server("--eplb-config", json.dumps(EPLB), env=ENVIRONMENT)
def test_requests_come_back_whole_while_every_level_fails(server: Any) -> None:
    burst(server, 8)
    assert set(counted(call(f"{server.root}/gimbal/status")).values()) == {0}
    FAULTS.write_text("0.05")
    burst(server, 500)
    FAULTS.unlink()
    burst(server, 8)  # what failed at the end has been told
    status = call(f"{server.root}/gimbal/status")
    assert min(counted(status).values()) > 0, counted(status)
    assert not status["dispatch"]["switched_itself_off"]
    print("fallbacks at 5 %:", counted(status))


@pytest.mark.server("--eplb-config", json.dumps(EPLB), env=ENVIRONMENT)
def test_levels_that_always_fail_leave_a_server_that_serves(server: Any) -> None:
    FAULTS.write_text("1")
    over = (
        "switches its level dispatch off",
        "switches its level queue off",
        "switches its level placement off",
        "all ranks leave experts to vLLM",
    )
    for _ in range(20):  # an idle engine takes no steps: experts stay until it does
        burst(server, 64)
        log = server.log.read_text(errors="replace")
        if all(line in log for line in over):
            break
    else:
        pytest.fail(f"not all levels are off: {[line for line in over if line not in log]}")
    burst(server, 64)
    FAULTS.unlink()
    burst(server, 64)
    status = call(f"{server.root}/gimbal/status")
    assert status["dispatch"]["switched_itself_off"]
    assert status["policies"]["dispatch"] is None
