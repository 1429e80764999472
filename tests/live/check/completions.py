"""What the checks ask of the completions endpoint: greedy tokens, and scores of given tokens."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import aiohttp

TIMEOUT = aiohttp.ClientTimeout(total=600)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Greedy:
    """A greedy continuation: its tokens, their log-probabilities and the best alternatives'."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    top: tuple[dict[int, float], ...]


async def post(session: aiohttp.ClientSession, url: str, body: dict[str, Any], rank: int) -> Any:
    """One completion pinned to DP rank `rank`; raises RuntimeError with the server's answer."""
    headers = {"X-data-parallel-rank": str(rank)}
    async with session.post(f"{url}/v1/completions", json=body, headers=headers) as reply:
        if reply.status != 200:
            raise RuntimeError(f"HTTP {reply.status}: {(await reply.text())[:300]}")
        return await reply.json()


async def greedy(
    session: aiohttp.ClientSession, url: str, prompt: Sequence[int], tokens: int, rank: int
) -> Greedy:
    """`tokens` greedy tokens after `prompt`."""
    body = {
        "model": "m",
        "prompt": list(prompt),
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "logprobs": 5,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
    }
    choice = (await post(session, url, body, rank))["choices"][0]
    top = tuple(
        {int(key.removeprefix("token_id:")): value for key, value in position.items()}
        for position in choice["logprobs"]["top_logprobs"]
    )
    return Greedy(tuple(choice["token_ids"]), tuple(choice["logprobs"]["token_logprobs"]), top)


async def score(
    session: aiohttp.ClientSession, url: str, tokens: Sequence[int], rank: int
) -> tuple[float, ...]:
    """Log-probability of every token of `tokens` after the first, given those before it."""
    body = {
        "model": "m",
        "prompt": list(tokens),
        "max_tokens": 1,
        "temperature": 0,
        "prompt_logprobs": 0,
    }
    choice = (await post(session, url, body, rank))["choices"][0]
    entries = choice["prompt_logprobs"][1:]
    return tuple(
        float(entry[str(token)]["logprob"])
        for entry, token in zip(entries, tokens[1:], strict=True)
    )


def together(
    items: Sequence[T], call: Callable[[aiohttp.ClientSession, T], Awaitable[Any]]
) -> list[Any]:
    """Runs `call` for all `items` at once, in one event loop; results in order."""

    async def run() -> list[Any]:
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(timeout=TIMEOUT, connector=connector) as session:
            return list(await asyncio.gather(*(call(session, item) for item in items)))

    return asyncio.run(run())
