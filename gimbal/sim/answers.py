"""Which prefix blocks a request leaves in the cache: those of its prompt, and of its answer.

vLLM caches the blocks of a request's generated tokens as it does those of its prompt, so that the
next turn of a conversation finds both. A trace names the blocks of prompts alone; those of an
answer are named by the prompt that contains it.
"""

from __future__ import annotations

from itertools import pairwise

from gimbal.workloads.trace import Trace, TraceRequest

SEVERAL = -1
"""In place of a block: what follows differs from prompt to prompt."""


def answered_blocks(trace: Trace) -> list[tuple[int, ...]]:
    """Of every request, ids of the blocks that its prompt and answer fill, the last perhaps in
    part; empty where no later prompt contains both.

    The later prompt is the next one of the same session. In a trace without sessions it is the next
    one that has all whole blocks of this prompt and more, provided that every such prompt goes on
    with the same block: behind a system prompt they do not.
    """
    size = trace.prefix_block_tokens
    found: list[tuple[int, ...]] = [()] * len(trace)
    if not size:
        return found
    sole = _successors(trace.requests, size)
    later: dict[str | int, TraceRequest] = {}  # by session, or by block where there is none
    for index in range(len(trace) - 1, -1, -1):
        request = trace.requests[index]
        whole = _whole_blocks(request, size)
        key: str | int | None = request.session
        if key is None and whole and sole.get(whole[-1], SEVERAL) != SEVERAL:
            key = whole[-1]
        following = None if key is None else later.get(key)
        if following is not None and _contains(following, request, whole):
            filled = -(-answered_tokens(request) // size)
            found[index] = following.prefix_blocks[:filled]
        if request.session is not None:
            later[request.session] = request
        else:
            later.update(dict.fromkeys(whole[:-1], request))
    return found


def answered_tokens(request: TraceRequest) -> int:
    """Tokens of a request that has ended whose KV was computed: not its last one's."""
    return request.prompt_tokens + request.output_tokens - 1


def _whole_blocks(request: TraceRequest, size: int) -> tuple[int, ...]:
    return request.prefix_blocks[: request.prompt_tokens // size]


def _contains(following: TraceRequest, request: TraceRequest, whole: tuple[int, ...]) -> bool:
    """Whether the prompt of `following` is long enough for, and begins with, all of `request`."""
    return (
        following.prompt_tokens >= answered_tokens(request)
        and following.prefix_blocks[: len(whole)] == whole
    )


def _successors(requests: tuple[TraceRequest, ...], size: int) -> dict[int, int]:
    """Block -> the whole block behind it in all prompts of no session, or SEVERAL."""
    behind: dict[int, int] = {}
    for request in requests:
        if request.session is None:
            whole = _whole_blocks(request, size)
            for block, following in pairwise(whole):
                if behind.setdefault(block, following) != following:
                    behind[block] = SEVERAL
    return behind
