"""Steps within CUDA graphs on a running server, whose launches beyond them are imitated."""

from __future__ import annotations

import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from tests.live.client import call

pytestmark = pytest.mark.live

GRAPH_TOKENS = 128
FOLDERS = [str(Path(__file__).with_name(name)) for name in ("launch_floor", "on_import")]
ENVIRONMENT = {
    "LAUNCH_FLOOR": f"{GRAPH_TOKENS}:80",
    "LAUNCH_TOLD": "1",  # what is concluded must not depend on the machine's speed
    "PYTHONPATH": os.pathsep.join(filter(None, (*FOLDERS, os.environ.get("PYTHONPATH")))),
}
ADMIN = ("--additional-config", '{"gimbal": {"admin": true}}')
CUT = "gimbal_engine_queue_graph_steps_total"


def complete(server: Any, prompt_tokens: int, output_tokens: int) -> None:
    """One request of exactly these lengths, its prompt unlike any other's."""
    seed = time.perf_counter_ns()
    prompt = [1000 + (seed >> shift) % 997 + shift for shift in range(prompt_tokens)]
    body = {
        "model": server.model,
        "prompt": prompt,
        "max_tokens": output_tokens,
        "ignore_eos": True,
    }
    usage = call(f"{server.url}/completions", body)["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (prompt_tokens, output_tokens)


def counted(server: Any) -> dict[str, float]:
    """Steps cut so far, by engine.

    Engines publish the count every eight steps, and the front end shows it twice a second.
    """
    with ThreadPoolExecutor(4) as pool:
        for answer in [pool.submit(complete, server, 20, 40) for _ in range(4)]:
            answer.result()
    time.sleep(1.5)
    return server.metric_by_engine(CUT)


def load(server: Any, prompts: int) -> dict[str, float]:
    """Prompts that fit into a graph and that do not, beside decodes; returns cut steps by engine.

    One at a time, so that a slow machine's backlog never exceeds what fits into two graphs.
    """
    before = counted(server)
    done = Event()

    def decode() -> None:
        while not done.is_set():
            complete(server, 20, 100)

    with ThreadPoolExecutor(4) as pool:
        decoding = [pool.submit(decode) for _ in range(4)]
        try:
            for _ in range(prompts):
                complete(server, 60, 2)
                complete(server, 160, 2)
        finally:
            done.set()
        for answer in decoding:
            answer.result()
    after = counted(server)
    return {engine: after[engine] - before[engine] for engine in after}


@pytest.mark.server(*ADMIN, levels="dispatch,queue", env=ENVIRONMENT)
def test_prefill_keeps_to_graphs_once_steps_have_shown_that_it_pays(server: Any) -> None:
    cut = load(server, 60)  # some twenty pairs teach what steps take
    assert set(cut) == {"0", "1"}
    assert sum(cut.values()) >= 10, cut
    counter = re.compile(r"\w*fallback\w*_total\b")  # _created beside it is a date
    fallbacks = [value for name, value in server.metrics().items() if counter.match(name)]
    assert fallbacks
    assert not any(fallbacks)
    call(f"{server.root}/gimbal/control", {"queue": {"graph_steps": 0}})
    assert max(load(server, 12).values()) == 0
