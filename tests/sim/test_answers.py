"""A next turn finds the last answer in the cache, and nobody finds what was never computed."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from gimbal.core.queue import ORDERINGS
from gimbal.sim.answers import answered_blocks
from gimbal.sim.engine import Engine
from gimbal.sim.requests import requests_of
from gimbal.workloads.trace import Trace, TraceRequest, make_trace

SIZE = 16


def trace_of(*rows: tuple[int, int, tuple[int, ...]], session: str | None = None) -> Trace:
    requests = [
        TraceRequest(float(i), prompt, output, session, None, blocks)
        for i, (prompt, output, blocks) in enumerate(rows)
    ]
    return make_trace("t", requests, prefix_block_tokens=SIZE)


def ids(begin: int, count: int) -> tuple[int, ...]:
    return tuple(range(begin, begin + count))


CHAT = ((40, 30, ids(0, 3)), (100, 20, ids(0, 7)), (140, 9, ids(0, 9)))


@pytest.mark.parametrize("session", ["s", None])
def test_an_answer_is_named_by_the_prompt_that_contains_it(session: str | None) -> None:
    found = answered_blocks(trace_of(*CHAT, session=session))
    # 40 + 30 - 1 tokens reach into the fifth block, 100 + 20 - 1 into the eighth.
    assert found == [ids(0, 5), ids(0, 8), ()]


def test_other_prompts_behind_one_system_prompt_contain_no_answer() -> None:
    rows = [(40, 4, (0, 1, i)) for i in range(10, 14)]
    rows += [(60, 4, (0, 1, i, i + 1)) for i in range(20, 26, 2)]
    assert answered_blocks(trace_of(*rows)) == [()] * 7
    assert answered_blocks(trace_of(*rows[:4])) == [()] * 4


def test_an_answer_that_the_next_turn_leaves_out_is_not_named() -> None:
    short = (CHAT[0], (50, 20, ids(0, 4)))  # thoughts of 30 tokens were dropped
    assert answered_blocks(trace_of(*short, session="s")) == [(), ()]
    other = (CHAT[0], (100, 20, (0, 7, 8, 9, 10, 11, 12)))  # the context was rewritten
    assert answered_blocks(trace_of(*other, session="s")) == [(), ()]


def test_a_trace_without_blocks_has_none() -> None:
    bare = make_trace("t", [TraceRequest(0.0, 9, 9, "s"), TraceRequest(1.0, 30, 9, "s")])
    assert answered_blocks(bare) == [(), ()]


def computed_tokens(trace: Trace) -> list[int]:
    """Prompt tokens that one engine computes for each request, one after the other."""
    engine = Engine(0, 512, 8, 1000, 4, ORDERINGS.build("fcfs"))
    engine.set_prefix_block_tokens(trace.prefix_block_tokens)
    computed = []
    for request in requests_of(trace, SimpleNamespace(api_us=0.0), {"any": 0}):  # type: ignore[arg-type]
        engine.add(request, 0.0)
        before = engine.served_prefill_tokens
        while engine.busy:
            engine.finish_step(engine.schedule(0.0), 0.0)
        computed.append(engine.served_prefill_tokens - before)
    return computed


@pytest.mark.parametrize("session", ["s", None])
def test_the_next_turn_computes_what_is_new(session: str | None) -> None:
    # 69 and 119 tokens are held, whole KV blocks of 4 are found.
    assert computed_tokens(trace_of(*CHAT, session=session)) == [40, 100 - 68, 140 - 116]


def test_without_the_answer_a_prompt_alone_is_found() -> None:
    trace = trace_of(*CHAT, session="s")
    turns = [replace(r, session=str(i)) for i, r in enumerate(trace.requests)]  # no one's next
    alone = replace(trace, requests=tuple(turns))
    assert computed_tokens(alone) == [40, 100 - 40, 140 - 100]


def test_the_same_prompt_again_computes_a_block() -> None:
    twice = trace_of((40, 30, ids(0, 3)), (40, 30, ids(0, 3)))
    assert computed_tokens(twice) == [40, 4]
