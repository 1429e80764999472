import pytest

from gimbal.core.queue.budget import (
    PrefillCandidate,
    StepCost,
    bounded_prefill_tokens,
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


def bounded(base=25_000.0, per_token=500.0, budget=512, backlog=0, next_us=0.0, **options):
    cost = StepCost(base, per_token, next_us)
    return bounded_prefill_tokens(cost, budget, backlog, **{"min_tokens": 16} | options)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, 75),  # (2.5 - 1) * 25 ms / 0.5 ms
        ({"per_token": 0.0}, 512),
        ({"base": 0.0}, 512),
        ({"backlog": 140}, 75),
        ({"backlog": 600}, 300),
        # Where hardly any step prefills no other engine's decodes are spared by two steps.
        ({"backlog": 300, "prefill_share": 0.3}, 300),
        ({"backlog": 300, "prefill_share": 0.4}, 150),
        # What decodes bear goes by the dearer token, large enough by the prompt's own.
        ({"next_us": 100.0}, 75),
        ({"next_us": 1000.0}, 37),
        ({"next_us": 1000.0, "backlog": 10**6}, 200),
        ({"next_us": 600.0, "per_token": 50.0, "backlog": 10**6}, 333),
        ({"backlog": 10**6}, 400),  # 25 ms / (0.125 * 0.5 ms): an eighth longer than at once
        ({"backlog": 10**6, "base": 250_000.0}, 512),
        ({"backlog": 10**6, "per_token": 5e-324}, 512),
        ({"tpot_us": 50_000.0}, 50),
        ({"tpot_us": 1.0}, 16),
        ({"tpot_us": 1.0, "min_tokens": 0, "backlog": 1}, 0),
        ({"tpot_us": 1e12}, 75),
        # 300 tokens take 150 ms and three quarters of a second is left: 300 * 25 / (800 - 150).
        ({"backlog": 300, "ttft_us": 1e6, "tpot_us": 1.0, "min_tokens": 1}, 11),
        ({"backlog": 300, "ttft_us": 1e6, "waited_us": 6e5, "tpot_us": 1.0}, 150),
        ({"backlog": 300, "ttft_us": 1e6, "waited_us": 7e5, "tpot_us": 1.0}, 512),
        ({"backlog": 300, "ttft_us": 1e6}, 75),  # less would help nobody
    ],
)
def test_prefill_beside_decodes(arguments, expected):
    assert bounded(**arguments) == expected


def test_a_backlog_is_cleared_in_time_in_steps_that_are_as_even_as_can_be():
    """Prompts that came together meet their target, and no step is larger than the first."""
    backlog, waited, sizes = 3000, 0.0, []
    while backlog > 0:
        sizes.append(
            min(backlog, bounded(budget=8192, backlog=backlog, waited_us=waited, ttft_us=3e6))
        )
        backlog -= sizes[-1]
        waited += 25_000.0 + 500.0 * sizes[-1]
    assert waited <= 0.8 * 3e6 + 25_000.0
    assert max(sizes) <= sizes[0] + 1
