import pytest

from gimbal.core.queue.budget import (
    PrefillCandidate,
    StepCost,
    protected_prefill_tokens,
    share_prefill_budget,
)


def candidates(*pairs):
    return [PrefillCandidate(key, tokens) for key, tokens in pairs]


@pytest.mark.parametrize(
    ("running", "waiting", "budget", "expected"),
    [
        ([(9.0, 3000)], [], 512, [512]),
        ([(9.0, 3000)], [(1.0, 100)], 512, [412]),
        ([(9.0, 3000)], [(1.0, 400), (2.0, 400)], 512, [0]),
        ([(9.0, 3000)], [(10.0, 100)], 512, [512]),
        ([(9.0, 3000)], [(9.0, 100)], 512, [512]),
        ([(9.0, 3000), (1.0, 100)], [(5.0, 200)], 512, [212, 100]),
        ([(9.0, 30)], [(1.0, 100)], 512, [30]),
        ([(9.0, 30)], [(1.0, 100)], -4, [0]),
    ],
)
def test_share(running, waiting, budget, expected):
    assert share_prefill_budget(candidates(*running), candidates(*waiting), budget) == expected


def protect(base=25_000.0, per_token=500.0, budget=512, decoding=4, backlog=0, **change):
    options = {"tpot_factor": 3.0, "patience_steps": 8.0, "min_tokens": 16} | change
    cost = StepCost(base, per_token)
    return protected_prefill_tokens(cost, budget, decoding, backlog, **options)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, 100),  # (3 - 1) * 25 ms / 0.5 ms
        ({"decoding": 0}, 512),
        ({"per_token": 0.0}, 512),
        ({"backlog": 800}, 100),
        ({"backlog": 1600}, 200),
        ({"backlog": 1600, "patience_steps": 4.0}, 400),
        ({"backlog": 10**6}, 512),
        ({"tpot_factor": 1.0}, 16),
        ({"tpot_factor": 50.0}, 512),
        ({"tpot_factor": 1.0, "min_tokens": 0}, 1),
    ],
)
def test_protected_prefill(arguments, expected):
    assert protect(**arguments) == expected


def test_a_backlog_is_cleared_in_patience_steps_or_at_the_whole_budget():
    backlog, steps = 3000, 0
    while backlog > 800:  # below that the factor alone allows more
        backlog -= protect(backlog=backlog)
        steps += 1
    # A share of what is left, step after step: 3000 * (7/8)**n <= 800.
    assert steps == 10
