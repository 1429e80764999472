"""The official client against the demo server: what a user of any OpenAI endpoint expects."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

pytestmark = pytest.mark.live
PROMPT = [{"role": "user", "content": "the quick brown fox"}]


@pytest.fixture
def client(server: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=120)


def exact(tokens: int) -> dict[str, Any]:
    """Exactly `tokens` tokens of output: random weights may draw the end token any time."""
    return {"max_tokens": tokens, "temperature": 0.0, "extra_body": {"ignore_eos": True}}


def test_chat(client: openai.OpenAI, server: Any) -> None:
    reply = client.chat.completions.create(model=server.model, messages=PROMPT, **exact(12))
    assert reply.choices[0].message.role == "assistant"
    assert reply.choices[0].message.content
    assert reply.choices[0].finish_reason == "length"
    assert reply.usage.completion_tokens == 12
    assert reply.usage.prompt_tokens > 4


def test_completion_is_deterministic(client: openai.OpenAI, server: Any) -> None:
    asked = {"model": server.model, "prompt": "one two three", **exact(16)}
    first, second = (client.completions.create(**asked).choices[0].text for _ in range(2))
    assert first == second


def test_streaming_with_usage(client: openai.OpenAI, server: Any) -> None:
    stream = client.chat.completions.create(
        model=server.model,
        messages=PROMPT,
        stream=True,
        stream_options={"include_usage": True},
        **exact(20),
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    whole = client.chat.completions.create(model=server.model, messages=PROMPT, **exact(20))
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == 20
    assert len([c for c in chunks if c.choices and c.choices[0].delta.content]) > 1


def test_abort_in_mid_stream_frees_the_engine(client: openai.OpenAI, server: Any) -> None:
    stream = client.completions.create(
        model=server.model, prompt="forever and ever", stream=True, **exact(4000)
    )
    for _, chunk in zip(range(3), stream, strict=False):
        assert chunk.choices
    stream.close()
    deadline_s = time.monotonic() + 30
    while sum(server.metric_by_engine("vllm:num_requests_running").values()) > 0:
        assert time.monotonic() < deadline_s, "the aborted request still runs"
        time.sleep(0.2)


def test_a_prompt_that_is_too_long_is_refused(client: openai.OpenAI, server: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="8192"):
        client.completions.create(model=server.model, prompt=[1] * 9000, max_tokens=1)


def test_both_engines_work(client: openai.OpenAI, server: Any) -> None:
    def ask(number: int) -> int:
        reply = client.completions.create(
            model=server.model, prompt=f"request {number}", **exact(8)
        )
        return reply.usage.completion_tokens

    before = server.metric_by_engine("vllm:generation_tokens_total")
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(ask, range(16))) == [8] * 16
    after = server.metric_by_engine("vllm:generation_tokens_total")
    assert set(after) == {"0", "1"}
    assert all(after[engine] > before.get(engine, 0.0) for engine in after), (before, after)
