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


def protect(base=25_000.0, per_token=500.0, budget=512, decoding=4, backlog=0, others=0, **change):
    options = {"tpot_factor": 3.0, "throughput_loss": 0.1, "min_tokens": 16} | change
    cost = StepCost(base, per_token)
    return protected_prefill_tokens(cost, budget, decoding, backlog, others, **options)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, 100),  # (3 - 1) * 25 ms / 0.5 ms
        ({"decoding": 0}, 512),
        ({"per_token": 0.0}, 512),
        ({"backlog": 800}, 100),
        ({"backlog": 801}, 227),
        ({"others": 300}, 300),
        ({"others": 900}, 512),
        ({"tpot_factor": 1.0}, 16),
        ({"tpot_factor": 50.0}, 512),
    ],
)
def test_protected_prefill(arguments, expected):
    assert protect(**arguments) == expected


@pytest.mark.parametrize("loss", [0.02, 0.1, 0.3])
def test_backlog_keeps_prefill_throughput(loss):
    base, per_token, budget = 25_000.0, 500.0, 512
    p = protect(backlog=10**6, throughput_loss=loss, tpot_factor=1.01)

    def throughput(tokens):
        return tokens / (base + per_token * tokens)

    assert throughput(p) >= (1.0 - loss) * throughput(budget) * 0.99
    assert p < budget
