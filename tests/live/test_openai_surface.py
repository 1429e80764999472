"""What the official client may ask of vLLM: the same greedy answers with every level as with none.

None is a server of its own, started with ``--levels none``: levels switched off at run time leave
what was installed at the start where it is, and placement cannot be switched off at all. All is
asked one request at a time, so that both servers run the same batches.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import openai
import pytest

from tests.live.client import call

pytestmark = pytest.mark.live
FLAGS = (
    "--enable-auto-tool-choice",
    "--tool-call-parser",
    "hermes",
    # Whitespace that a grammar leaves free is nothing but ties in a model of random weights.
    "--structured-outputs-config",
    '{"backend": "xgrammar", "disable_any_whitespace": true}',
)
ENVIRONMENT = {"TORCH_COMPILE_DISABLE": "1"}
"""Else vLLM compiles, for half a minute, what counts the ranks of the first log-probabilities."""
USER = [{"role": "user", "content": "the quick brown fox jumps over the lazy dog"}]
DIALOGUE = [
    {"role": "system", "content": "be brief"},
    *USER,
    {"role": "assistant", "content": "why"},
    {"role": "user", "content": "so"},
]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "unit": {"enum": ["C", "F"]}},
    "required": ["city", "unit"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
NAMED = {"type": "function", "function": {"name": "weather"}}
TEMPORARY = ("id", "created", "system_fingerprint", "created_at", "completed_at", "item_id", "rank")
"""What no two answers have in common; the rank is a prompt token's among thousands of near ones."""
LOGPROB_ERROR = 0.15
"""Activations are bf16: `tests.live.test_placement` allows other batch shapes as much."""


def bare(value: Any) -> Any:
    """An answer without what tells it from the same answer to the same question."""
    if hasattr(value, "model_dump"):
        value = value.model_dump()
    if isinstance(value, dict):
        return {k: bare(v) for k, v in value.items() if k not in TEMPORARY}
    if isinstance(value, list):
        return [bare(part) for part in value]
    return value


def close_to(value: Any) -> Any:
    """Equal to every answer that is `value`, but for what rounding does to log-probabilities."""
    if isinstance(value, dict):
        return {k: close_to(v) for k, v in value.items()}
    if isinstance(value, list):
        return [close_to(part) for part in value]
    return pytest.approx(value, abs=LOGPROB_ERROR) if isinstance(value, float) else value


def joined(chunks: Iterable[Any]) -> Any:
    """What a stream says, by choice: how it is cut into chunks is a matter of time."""
    said: dict[int, str] = {}
    ends: dict[int, str | None] = {}
    usage = None
    for chunk in chunks:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            if hasattr(choice, "text"):
                text = choice.text
            else:
                called = [call.function for call in choice.delta.tool_calls or []]
                text = choice.delta.content or ""
                text += "".join(f"{f.name or ''}{f.arguments or ''}" for f in called)
            said[choice.index] = said.get(choice.index, "") + text
            ends[choice.index] = choice.finish_reason or ends.get(choice.index)
    return [said, ends, bare(usage)]


def cut(stream: Any, characters: int) -> str:
    """The first `characters` of a stream whose reader then goes away."""
    text = ""
    for chunk in stream:
        text += chunk.choices[0].text
        if len(text) >= characters:
            break
    stream.close()
    return text[:characters]


def begins_an_object(answer: Any) -> bool:
    """What is sure of free JSON: of a model of random weights all else in it is ties."""
    [choice] = answer.choices
    return bool(choice.message.content.lstrip().startswith("{"))


def refusal(ask: Callable[[], Any]) -> Any:
    """The status and the words of an answer that is none; xgrammar's bear the time of day."""
    with pytest.raises(openai.APIStatusError) as refused:
        ask()
    return [refused.value.status_code, re.sub(r"\d\d:\d\d:\d\d", "", str(refused.value.body))]


def chats(create: Callable[..., Any]) -> dict[str, Any]:
    """Chat completions, by what is asked."""
    exact: dict[str, Any] = {"max_tokens": 12, "temperature": 0.0, "messages": USER}
    exact |= {"extra_body": {"ignore_eos": True}}
    # vLLM refuses n > 1 at temperature 0: the one likeliest token is as greedy.
    many = exact | {"temperature": 1.0, "extra_body": {"ignore_eos": True, "top_k": 1}}
    # Some 60 tokens are a whole call, which its grammar ends.
    free = {"max_tokens": 100, "temperature": 0.0, "messages": USER}
    streamed = {"stream": True, "stream_options": {"include_usage": True}}
    form = {"type": "json_schema", "json_schema": {"name": "weather", "schema": SCHEMA}}
    tool = free | {"tools": [TOOL]}
    return {
        "chat": bare(create(**exact)),
        "dialogue": bare(create(**exact | {"messages": DIALOGUE})),
        "chat n": bare(create(n=3, **many)),
        "chat n at temperature 0": refusal(lambda: create(n=2, **exact)),
        "chat stream": joined(create(**exact, **streamed)),
        "chat stream n": joined(create(n=2, **many, **streamed)),
        "chat logprobs": bare(create(logprobs=True, top_logprobs=1, **exact)),
        "seed": bare(create(seed=7, **exact | {"temperature": 0.8})),
        "penalties": bare(create(frequency_penalty=1.5, **exact)),
        "json schema": bare(create(response_format=form, **free)),
        "json object": begins_an_object(
            create(response_format={"type": "json_object"}, **free | {"max_tokens": 24})
        ),
        "tool, named": bare(create(tool_choice=NAMED, **tool)),
        "tool, named, stream": joined(create(tool_choice=NAMED, **tool, **streamed)),
        "tool, required": bare(create(tool_choice="required", **tool)),
        "tool, auto": bare(create(tool_choice="auto", **tool | {"max_tokens": 12})),
        "unknown tool": refusal(
            lambda: create(tool_choice=NAMED | {"function": {"name": "x"}}, **tool)
        ),
    }


def completions(create: Callable[..., Any]) -> dict[str, Any]:
    """Completions, by what is asked."""
    exact: dict[str, Any] = {"max_tokens": 12, "temperature": 0.0, "prompt": "one two three"}
    exact |= {"extra_body": {"ignore_eos": True}}
    many = exact | {"temperature": 1.0, "extra_body": {"ignore_eos": True, "top_k": 1}}
    prompts = ["one two three", "a longer prompt " * 40, "four"]
    listed = exact | {"prompt": prompts}

    def structured(**how: Any) -> Any:
        asked = exact | {"max_tokens": 24, "extra_body": {"structured_outputs": how}}
        return create(**asked)

    return {
        "completion": bare(create(**exact)),
        "list of prompts": bare(create(**listed)),
        "token ids": bare(create(**exact | {"prompt": [[7, 8, 9], [10, 11]]})),
        "completion n": bare(create(n=2, **many | {"prompt": prompts[:2]})),
        "completion stream": joined(
            create(**listed, stream=True, stream_options={"include_usage": True})
        ),
        "completion logprobs": bare(create(logprobs=1, echo=True, **exact)),
        "stop": bare(create(stop=["e", "a"], **exact)),
        "choice": bare(structured(choice=["yes", "no"])),
        "regex": bare(structured(regex="[0-9]{3}-[0-9]{4}")),
        "cancelled": cut(create(stream=True, **exact | {"max_tokens": 4000}), 8),
        "after it": bare(create(**exact | {"prompt": "and again"})),
        "bad regex": refusal(lambda: structured(regex="([")),
        "too long": refusal(lambda: create(**exact | {"prompt": [1] * 9000})),
        "no such model": refusal(lambda: create(**exact | {"model": "absent"})),
    }


def answers(server: Any) -> dict[str, Any]:
    """One answer to everything that is asked, by what it is."""
    client = openai.OpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=120)
    model = server.model

    def asked(create: Callable[..., Any]) -> Callable[..., Any]:
        return lambda **values: create(**{"model": model} | values)

    response = asked(client.responses.create)
    return {
        "models": [m.id for m in client.models.list()],
        **chats(asked(client.chat.completions.create)),
        **completions(asked(client.completions.create)),
        "response": bare(response(input="the quick fox", temperature=0.0, max_output_tokens=12)),
        "embeddings": refusal(lambda: client.embeddings.create(model=model, input="x")),
    }


@pytest.mark.server(*FLAGS, levels="none", env=ENVIRONMENT)
def test_the_same_answers_with_every_level_and_with_none(server: Any, server_pool: Any) -> None:
    status = call(f"{server.root}/gimbal/status")
    assert status["policies"] == dict.fromkeys(("dispatch", "ordering", "placer"))
    off = answers(server)
    assert off["choice"]["choices"][0]["text"] in ("yes", "no")
    [tool] = off["tool, named"]["choices"][0]["message"]["tool_calls"]
    assert tool["function"]["name"] == "weather"
    assert len(off["completion n"]["choices"]) == 4
    assert off["json object"] is True
    assert off["too long"][0] == 400

    server = server_pool.get((FLAGS, None, tuple(ENVIRONMENT.items())))
    on = answers(server)
    differ = {what: (off[what], on[what]) for what in off if on[what] != close_to(off[what])}
    assert differ == {}
    status = call(f"{server.root}/gimbal/status")
    assert status["policies"] == {"dispatch": "gimbal", "ordering": "gimbal", "placer": "gimbal"}
    assert sum(entry["count"] for entry in status["dispatch"]["decisions"]) > 30
    assert status["dispatch"]["fallbacks"] == {}
