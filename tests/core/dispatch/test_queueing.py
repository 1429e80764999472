"""What the policies do to queues, on the toy engines of `gimbal.testing`.

The lengths are log-normal with the median and tail of BurstGPT's (217 tokens, a mean of 360, a few
thousand at the 99th percentile; `benchmarks/dispatch_queueing.py` uses the real ones).
"""

import dataclasses
import random

import pytest

from gimbal.core.config import DispatchConfig
from gimbal.core.dispatch.dispatcher import Dispatcher
from gimbal.testing import (
    FakeGroup,
    FakeMachine,
    conversation_requests,
    poisson_requests,
    serve,
    shared_prefix_requests,
)

BASELINES = ("vllm", "vllm-legacy", "round-robin", "total-tokens", "lmetric", "dynamo", "llm-d")


def long_tailed(count=2000):
    rng = random.Random(11)
    return [
        (
            min(8000, max(10, round(rng.lognormvariate(5.38, 0.95)))),
            min(1000, max(1, round(rng.lognormvariate(2.8, 1.5)))),
        )
        for _ in range(count)
    ]


def at_load(load, machine, requests):
    """The same requests, sped up to `load` of what the engines can serve when saturated."""
    saturated = [dataclasses.replace(r, arrival_us=0.0) for r in requests]
    needed_s = serve(machine, "round-robin", saturated).duration_s
    factor = needed_s * 1e6 / load / requests[-1].arrival_us
    return [dataclasses.replace(r, arrival_us=r.arrival_us * factor) for r in requests]


@pytest.mark.parametrize("seed", [1, 2])
def test_long_tailed_lengths(seed):
    machine = FakeMachine()
    requests = at_load(0.9, machine, poisson_requests(long_tailed(), 1.0, 500, seed))
    gimbal = serve(machine, "gimbal", requests)
    for name in BASELINES:
        baseline = serve(machine, name, requests)
        # LMetric is as good on means here; the margin is for the luck of 500 requests.
        assert gimbal.ttft_mean_s <= 1.1 * baseline.ttft_mean_s, name


@pytest.mark.parametrize("seed", [1, 2])
def test_shared_prefixes_are_not_scattered(seed):
    machine = FakeMachine(engines=4, kv_tokens=30_000)
    lengths = long_tailed()
    requests = shared_prefix_requests(40, 1500, lengths, 1.0, 400, seed)
    requests = at_load(0.9, machine, requests)
    gimbal, turns = serve(machine, "gimbal", requests), serve(machine, "round-robin", requests)
    assert gimbal.ttft_mean_s < turns.ttft_mean_s
    assert gimbal.ttft_p99_s < turns.ttft_p99_s
    assert gimbal.tpot_mean_s < turns.tpot_mean_s
    assert gimbal.computed_tokens < turns.computed_tokens


def test_conversations_find_their_context():
    machine = FakeMachine()
    requests = conversation_requests(long_tailed(), 1.0, 400, 3)
    gimbal, turns = serve(machine, "gimbal", requests), serve(machine, "round-robin", requests)
    assert gimbal.computed_tokens < 0.95 * turns.computed_tokens
    assert gimbal.ttft_mean_s < turns.ttft_mean_s


def test_every_request_finishes_and_the_accounts_close():
    requests = poisson_requests(long_tailed(), 8.0, 200, 5)
    dispatcher = Dispatcher(2, DispatchConfig())
    done = FakeGroup(FakeMachine(max_running=8, kv_tokens=12_000), dispatcher).run(requests)
    assert len(done) == 200
    assert dispatcher.ledger.inflight.sum() == 0
    assert all(r.first_token_us > r.arrival_us for r in done)
