"""What dispatch policies do to queues: the demo's engines, simulated.

The lengths are log-normal with the median and tail of BurstGPT's (217 tokens, a mean of 360, a few
thousand at the 99th percentile; `benchmarks/dispatch_queueing.py` uses the real ones).
"""

import dataclasses
import random

import pytest

from benchmarks.dispatch_queueing import (
    at_load,
    conversations,
    serve,
    shared_prefixes,
    unrelated,
)
from gimbal.report.arms import get_arm
from gimbal.sim.cluster import load_cluster
from gimbal.sim.routing import named_population
from gimbal.sim.run import Simulation

CLUSTER, PROFILE = load_cluster("cpu-demo")
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


@pytest.mark.parametrize("seed", [1, 2])
def test_long_tailed_lengths(seed):
    trace = at_load(0.9, CLUSTER, PROFILE, unrelated(long_tailed(), 500, seed))
    gimbal = serve(CLUSTER, PROFILE, "gimbal", trace)
    for name in BASELINES:
        baseline = serve(CLUSTER, PROFILE, name, trace)
        # LMetric is as good on means here; the margin is for the luck of 500 requests.
        assert gimbal.ttft_mean_s <= 1.1 * baseline.ttft_mean_s, name


@pytest.mark.parametrize("seed", [1, 2])
def test_shared_prefixes_are_not_scattered(seed):
    cluster = dataclasses.replace(CLUSTER, dp=4, kv_tokens=30_000)
    trace = at_load(0.9, cluster, PROFILE, shared_prefixes(long_tailed(), 400, seed, 40, 12))
    gimbal, turns = (serve(cluster, PROFILE, name, trace) for name in ("gimbal", "round-robin"))
    assert gimbal.ttft_mean_s < turns.ttft_mean_s
    assert gimbal.ttft_p99_s < turns.ttft_p99_s
    assert gimbal.tpot_mean_s < turns.tpot_mean_s
    assert gimbal.computed_tokens < turns.computed_tokens


def test_conversations_find_their_context():
    trace = at_load(0.9, CLUSTER, PROFILE, conversations(long_tailed(), 400, 3))
    gimbal, turns = (serve(CLUSTER, PROFILE, name, trace) for name in ("gimbal", "round-robin"))
    assert gimbal.computed_tokens < 0.95 * turns.computed_tokens
    assert gimbal.ttft_mean_s < turns.ttft_mean_s


def test_every_request_finishes_and_the_accounts_close():
    tight = dataclasses.replace(CLUSTER, max_num_seqs=8, kv_tokens=12_000)
    trace = at_load(2.0, tight, PROFILE, unrelated(long_tailed(), 200, 5))
    population = named_population(tight.routing, PROFILE)
    simulation = Simulation(trace, tight, PROFILE, population, get_arm("gimbal-dispatch"))
    records = simulation.run().records
    assert len(records) == 200
    assert simulation.answering.dispatcher.ledger.inflight.sum() == 0
    assert all(r.first_token_s > r.arrival_s for r in records)
