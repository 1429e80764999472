"""The decisions of one step, from views as data."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gimbal.core.config import QueueConfig
from gimbal.core.contracts import NO_TRAITS, OrderingTraits
from gimbal.core.queue.budget import HOLD_STEPS, PrefillCandidate, StepCost
from gimbal.core.queue.step import (
    LEAST_TOKENS,
    RecordedView,
    StepDecision,
    StepMemory,
    decide,
    record,
)
from gimbal.core.queue.traits import lacking, usable

LONG, SHORT = PrefillCandidate(900.0, 3000), PrefillCandidate(100.0, 200)


BESIDE_DECODES = {"decoding": 4, "decode_tokens": 4, "cost": StepCost(25_000.0, 500.0)}


def graphs(tokens=128, pays=True, exploring=False, flat=0):
    return SimpleNamespace(
        graph_tokens=tokens,
        exploring=exploring,
        flat_tokens=flat,
        small_steps_pay=lambda backlog: pays,
    )


TABLE = {
    "nothing to do": ({}, {}, StepDecision(512)),
    "a lone prefill has no cap": ({"running": (LONG,)}, {}, StepDecision(512)),
    "a long prefill leaves a newcomer its tokens": (
        {"running": (LONG,), "newcomers": (SHORT,)},
        {},
        StepDecision(512, caps=(312,), claimed=True),
    ),
    "not after it has yielded in vain": (
        {"running": (LONG,), "newcomers": (SHORT,), "may_yield": False},
        {},
        StepDecision(512),
    ),
    "not where steps are not shared": (
        {"running": (LONG,), "newcomers": (SHORT,)},
        {"in_batch": False},
        StepDecision(512),
    ),
    "every decode has its token, and nobody claims anything": (
        {"running": (LONG,), "decoding": 4, "decode_tokens": 4},
        {},
        StepDecision(512, caps=(508,)),
    ),
    "where decodes fill the step the first prefill moves on": (
        {"running": (LONG, SHORT), "decoding": 512, "decode_tokens": 512},
        {},
        StepDecision(512, caps=(0, LEAST_TOKENS)),
    ),
    "nobody claims more than its longest chunk": (
        {"running": (LONG,), "newcomers": (SHORT,), "longest_chunk_tokens": 128},
        {},
        StepDecision(512, caps=(128,)),
    ),
    "an interval holds prefill back beside decodes": (
        {"running": (LONG,), "decoding": 1, "decode_tokens": 1, "held_back": True},
        {},
        StepDecision(512, False),
    ),
    "but not where nothing decodes": (
        {"running": (LONG,), "held_back": True},
        {},
        StepDecision(512),
    ),
    "an engine without decodes spares those of its group": (
        {
            "group_backlog_tokens": 700.0,
            "group_decode_tokens": 4.0,
            "cost": StepCost(25_000.0, 500.0),
        },
        {},
        StepDecision(350),
    ),
    "and takes a full step where nobody decodes": (
        {"group_backlog_tokens": 700.0, "cost": StepCost(25_000.0, 500.0)},
        {},
        StepDecision(512),
    ),
    "a backlog of two graphs is prefilled in graphs": (
        {"backlog_tokens": 240, "decoding": 1, "decode_tokens": 1, "graphs": graphs()},
        {},
        StepDecision(128, asked_graphs=True, cut=True),
    ),
    "one larger is not": (
        {"backlog_tokens": 255, "decoding": 1, "decode_tokens": 1, "graphs": graphs()},
        {},
        StepDecision(512),
    ),
    "nor where another engine of the group has more": (
        {
            "backlog_tokens": 240,
            "decode_tokens": 1,
            "graphs": graphs(),
            "group_backlog_tokens": 255.0,
        },
        {},
        StepDecision(512),
    ),
    "nor where small steps do not pay": (
        {"backlog_tokens": 240, "decode_tokens": 1, "graphs": graphs(pays=False)},
        {},
        StepDecision(512),
    ),
    "one in a while is let through to see what it takes": (
        {"backlog_tokens": 240, "decode_tokens": 1, "graphs": graphs(exploring=True)},
        {},
        StepDecision(512, asked_graphs=True),
    ),
    "decodes bear a step of two and a half times their own": (
        BESIDE_DECODES | {"group_backlog_tokens": 140.0},
        {},
        StepDecision(79),
    ),
    "half of a large backlog goes into one step": (
        BESIDE_DECODES | {"group_backlog_tokens": 600.0},
        {},
        StepDecision(304),
    ),
    "nothing is bounded where nothing decodes": (
        BESIDE_DECODES | {"decoding": 0, "group_backlog_tokens": 200.0},
        {},
        StepDecision(512),
    ),
    "nor where it is switched off": (
        BESIDE_DECODES | {"group_backlog_tokens": 140.0},
        {"step_budget": False},
        StepDecision(512),
    ),
    "but not whole prompts": (
        BESIDE_DECODES | {"group_backlog_tokens": 140.0, "chunked": False},
        {},
        StepDecision(512),
    ),
    "what a graph covers is prefilled at once": (
        BESIDE_DECODES | {"group_backlog_tokens": 140.0, "graphs": graphs()},
        {},
        StepDecision(128),
    ),
    "and where no graph covers it, what takes as long": (
        BESIDE_DECODES | {"group_backlog_tokens": 600.0, "graphs": graphs(flat=450)},
        {},
        StepDecision(454),
    ),
    "but not instead of a step that a graph covers": (
        BESIDE_DECODES | {"group_backlog_tokens": 140.0, "graphs": graphs(flat=450)},
        {},
        StepDecision(128),
    ),
    "a target of TPOT says what decodes bear": (
        BESIDE_DECODES | {"group_backlog_tokens": 140.0},
        {"slo_tpot_ms": 45.0},
        StepDecision(74),
    ),
    "a target of TTFT says what prompts need": (
        BESIDE_DECODES | {"group_backlog_tokens": 300.0, "oldest_wait_us": 50_000.0},
        {"slo_ttft_ms": 300.0},
        StepDecision(191, admit=True),
    ),
    "all that there is once it is too late": (
        BESIDE_DECODES | {"group_backlog_tokens": 300.0, "oldest_wait_us": 250_000.0},
        {"slo_ttft_ms": 300.0},
        StepDecision(512),
    ),
}


@pytest.mark.parametrize("name", TABLE)
def test_decisions(name):
    view, options, expected = TABLE[name]
    assert decide(RecordedView(512, **view), QueueConfig(**options)) == expected


def test_a_recorded_view_is_its_own_record():
    view = RecordedView(512, running=(LONG,), newcomers=(SHORT,), decode_tokens=3)
    assert record(view) == view


candidates = st.lists(
    st.builds(PrefillCandidate, st.floats(-1e6, 1e6), st.integers(1, 9000)), max_size=6
).map(tuple)
views = st.builds(
    RecordedView,
    st.integers(1, 9000),
    chunked=st.booleans(),
    held_back=st.booleans(),
    decoding=st.integers(0, 50),
    decode_tokens=st.integers(0, 600),
    running=candidates,
    may_yield=st.booleans(),
    newcomers=candidates,
    longest_chunk_tokens=st.integers(0, 3000),
    backlog_tokens=st.integers(0, 10**6),
    group_backlog_tokens=st.floats(0.0, 1e6),
    group_decode_tokens=st.floats(0.0, 1e3),
    cost=st.builds(StepCost, st.floats(0.0, 1e6), st.floats(0.0, 1e4)),
    oldest_wait_us=st.floats(0.0, 1e9),
    graphs=st.builds(
        graphs, st.integers(0, 1000), st.booleans(), st.booleans(), st.integers(0, 9000)
    )
    | st.none(),
)
configs = st.builds(
    QueueConfig,
    in_batch=st.booleans(),
    graph_steps=st.floats(0.0, 8.0),
    step_budget=st.booleans(),
    slo_ttft_ms=st.sampled_from([0.0, 1e-3, 300.0, 1e9]),
    slo_tpot_ms=st.sampled_from([0.0, 1e-3, 50.0, 1e9]),
)


@given(views, configs)
def test_what_holds_for_every_step(view, config):
    decision = decide(view, config)
    assert 1 <= decision.budget_tokens <= view.budget_tokens
    assert decision.admit or view.held_back
    # Prefill moves on whatever bounds it: a block, or all that is left beside decodes.
    left = min(view.block_tokens, max(1, view.budget_tokens - view.decode_tokens))
    assert decision.budget_tokens >= min(view.budget_tokens, view.decode_tokens + left) or (
        decision.cut
    )
    if decision.caps is not None:
        left = max(0, decision.budget_tokens - view.decode_tokens)
        assert len(decision.caps) == len(view.running)
        assert sum(decision.caps) <= max(left, LEAST_TOKENS)
        for cap, candidate in zip(decision.caps, view.running, strict=True):
            assert 0 <= cap <= candidate.tokens
        assert any(decision.caps) or decision.claimed, "somebody moves on"
    assert decide(view, config) == decision, "nothing is learned by asking"


def test_memory_counts_and_pauses_after_yielding_in_vain():
    memory = StepMemory()
    yielded = StepDecision(512, caps=(312,), claimed=True)
    memory.ended(3, yielded, 512, somebody_waits=True)
    assert memory.may_yield(4)
    memory.ended(4, yielded, 312, somebody_waits=True)
    assert [memory.may_yield(step) for step in (5, 4 + HOLD_STEPS - 1, 4 + HOLD_STEPS)] == [
        False,
        False,
        True,
    ]
    memory.ended(20, StepDecision(128, cut=True), 128, somebody_waits=False)
    memory.ended(21, StepDecision(128, cut=True), 100, somebody_waits=False)
    assert (memory.yields, memory.graph_steps) == (2, 1)


def test_an_ordering_goes_without_what_it_does_not_declare():
    config = QueueConfig()
    bare = usable(config, NO_TRAITS)
    assert (bare.max_wait_s, bare.in_batch, bare.pass_steps, bare.graph_steps) == (0, False, 0, 0)
    assert lacking(config, NO_TRAITS) == [
        "max_wait_s (age_limit)",
        "in_batch (shares_steps)",
        "pass_steps (passes_blocked)",
        "room_tokens (passes_blocked)",
        "graph_steps (sizes_steps)",
        "step_budget (sizes_steps)",
    ]
    able = OrderingTraits(False, True, True, True, True)
    assert usable(config, able) == config
    assert lacking(config, able) == []
