"""The comparison behind the correctness table, on made-up answers."""

import json
import math
from dataclasses import replace

import pytest

from tests.live.check.agreement import (
    FLOAT32,
    NEAR_TIE,
    Reference,
    Tolerance,
    compare,
    greedy_agreement,
)
from tests.live.check.completions import Greedy
from tests.live.check.correctness import (
    PROMPT_TOKENS,
    default_layouts,
    fixed_prompts,
    rank_splits,
)
from tests.live.check.server import ServerLayout

WANT = Greedy((7, 8, 9), (-0.1, -0.7, -0.2), ({7: -0.1}, {8: -0.7, 5: -0.75, 6: -2.0}, {9: -0.2}))
REFERENCE = Reference(((1, 2),), (WANT,), ((1, 2, 7, 8, 9),), ((-1.0, -2.0, -0.5, -0.25),))


@pytest.mark.parametrize(
    ("tokens", "equal", "at_tie"),
    [
        ((7, 8, 9), 3, True),
        ((7, 5, 1), 1, True),  # 0.05 behind the best: a near-tie
        ((7, 6, 1), 1, False),  # 1.3 behind
        ((3, 8, 9), 0, False),  # not even among the alternatives
    ],
)
def test_greedy_may_differ_only_at_a_near_tie(tokens, equal, at_tie):
    assert pytest.approx(0.1) == NEAR_TIE
    assert greedy_agreement(WANT, replace(WANT, tokens=tokens)) == (equal, at_tie)


def row(scores, tolerance, decoded=WANT, moved=None):
    return compare(REFERENCE, scores, [decoded], "layout", "when", moved or {}, tolerance)


def test_a_row_says_how_far_apart_the_answers_are():
    passes = [[(-1.0, -2.0, -0.5, -0.25)], [(-1.0, -2.0, -0.5, -0.5)]]
    got = row(passes, Tolerance(0.04, 0.3), moved={"rearrangements": 3, "slots": 40})
    assert (got.tokens, got.max, got.p99) == (8, 0.25, 0.25)
    assert got.mean == pytest.approx(0.25 / 8)
    assert (got.migrations, got.moved_slots, got.greedy_equal) == (3, 40, 3)
    assert got.ok


@pytest.mark.parametrize(
    ("scores", "tolerance", "decoded"),
    [
        ((-1.0, -2.0, -0.5, -0.5), Tolerance(0.06, 0.3), WANT),  # mean
        ((-1.0, -2.0, -0.5, -0.5), Tolerance(1.0, 0.2), WANT),  # 99th percentile
        ((-1.0, -2.0, -0.5, -0.2501), FLOAT32, replace(WANT, tokens=(3, 8, 9))),  # decoding
        ((-1.0, -2.0, -0.5, math.nan), Tolerance(1.0, 1.0), WANT),
    ],
)
def test_each_bound_alone_puts_a_row_outside(scores, tolerance, decoded):
    assert not row([[scores]], tolerance, decoded).ok


def test_prompts_are_fixed_and_batched_unevenly_with_one_rank_idle_once():
    prompts = fixed_prompts(2048)
    assert prompts == fixed_prompts(2048)
    assert [len(p) for p in prompts] == list(PROMPT_TOKENS)
    assert all(259 <= token < 2048 for p in prompts for token in p)
    one, other, idle = rank_splits(2)
    assert sorted({one.count(0), other.count(0)}) == [3, 9]
    assert set(idle) == {0}


def test_a_layout_s_flags_say_what_its_name_says():
    layouts = default_layouts()
    assert len({x.name for x in layouts}) == len(layouts)
    assert layouts[1].name == "DP=2 EP=2 +4 async"
    assert layouts[2].name == "DP=2 TP=2 EP=4 +4 sync"
    flags = layouts[2].flags()
    eplb = json.loads(flags[flags.index("--eplb-config") + 1])
    assert eplb["num_redundant_experts"] == 4
    assert eplb["use_async"] is False
    assert eplb["window_size"] <= eplb["step_interval"]
    assert "--enable-expert-parallel" not in ServerLayout().flags()
    assert "--enable-eplb" not in ServerLayout(2, 1, True).flags()


def test_every_layout_is_checked_with_and_without_redundancy_sync_and_async():
    bf16 = [x for x in default_layouts() if x.dtype == "bfloat16"]
    for tp in (1, 2):
        assert {(x.redundant > 0) for x in bf16 if x.tp == tp} == {False, True}
        assert {x.asynchronous for x in bf16 if x.tp == tp} == {False, True}
