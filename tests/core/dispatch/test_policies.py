"""Every policy on small boards whose costs can be worked out by hand."""

import numpy as np
import pytest

from gimbal.core.contracts import argmin_rotating
from gimbal.core.dispatch import POLICIES
from gimbal.core.errors import InputError
from gimbal.core.snapshot import Field
from gimbal.testing import loads, request

QUEUED = {
    "waiting_requests": [2, 0],
    "waiting_prefill_tokens": [300, 0],
    "running_requests": [3, 0],
}
"""Engine 0 of two has a queue."""


@pytest.mark.parametrize(
    ("policy", "state", "expected"),
    [
        ("round-robin", loads(**QUEUED), [0, 0]),
        ("vllm-legacy", loads(**QUEUED), [4 * 2 + 3, 0]),
        (
            "vllm-legacy",
            loads(unacked_requests=[2, 0], unacked_tokens=[50, 0], client_count=3),
            [4 * 3 * 2, 0],
        ),
        ("vllm", loads(**QUEUED), [5, 0]),
        ("vllm", loads(inflight_requests=[4, 1], inflight_tokens=9, client_count=2), [8, 2]),
        # 80 % of KV in use: 5 + 2 * 6 * 0.3; without a waiting request KV does not count.
        (
            "vllm",
            loads(**QUEUED, kv_blocks_used=[800, 900]),
            [5 + 2 * 6 * 0.3, 0],
        ),
        # tokens first, requests (of at most 5, so sixths) only between equal tokens
        (
            "total-tokens",
            loads(
                waiting_requests=[2, 0],
                waiting_prefill_tokens=[300, 0],
                running_requests=[3, 1],
                running_tokens=[700, 900],
                pending_prefix_hit_tokens=[50, 0],
                awaited_kv_tokens=[0, 30],
                loaded_kv_tokens=[0, 70],
                unacked_requests=[0, 1],
                unacked_tokens=[0, 50],
            ),
            [1050 + 5 / 6, 1050 + 2 / 6],
        ),
        (
            "lmetric",
            loads(
                **QUEUED,
                running_prefill_tokens=[40, 0],
                unacked_requests=[0, 1],
                unacked_tokens=[0, 60],
                cached_tokens=[64, 0],
            ),
            [(36 + 340) * 6, (100 + 60) * 2],
        ),
        (
            "dynamo",
            loads(**QUEUED, kv_blocks_used=[7, 30], cached_tokens=[64, 0]),
            [(300 + 36) / 16 + 7, 100 / 16 + 30],
        ),
        (
            "llm-d",
            loads(**QUEUED, kv_blocks_used=[250, 0], cached_tokens=[50, 0]),
            [-(2 * 0 + 2 * 0.75 + 3 * 0.5), -(2 + 2 + 0)],
        ),
        ("llm-d", loads(2, waiting_requests=2, running_requests=3), [-4, -4]),
    ],
)
def test_baseline_costs(policy, state, expected):
    assert POLICIES.build(policy).costs(request(), state).tolist() == pytest.approx(expected)


def test_a_rate_near_nothing_is_no_rate():
    states = [loads(2, **QUEUED, prefill_tokens_per_s=rate) for rate in (0.0, 5e-324)]
    unknown, tiny = (POLICIES.build("gimbal").costs(request(), state) for state in states)
    assert np.isfinite(tiny).all()
    assert (tiny == unknown).all()


def terms(state, tokens=100, **options):
    """Terms by name of the gimbal policy."""
    policy = POLICIES.build("gimbal", {"expected_output_tokens": 0.0, **options})
    priced = policy.priced(request(tokens), state)
    rows = priced[:-1]
    assert rows.sum(axis=0).tolist() == pytest.approx(policy.costs(request(tokens), state).tolist())
    assert rows.sum(axis=0).tolist() == pytest.approx(priced[-1].tolist())
    return dict(zip(policy.term_names, rows.tolist(), strict=True))


def test_idle_engines_cost_their_own_prefill_only():
    named = terms(loads())
    assert named.pop("prefill") == pytest.approx([1000 + 10 * 100] * 2)
    assert all(value == pytest.approx([0, 0]) for value in named.values())


def test_queue_and_own_prefill_are_whole_steps():
    # 250 queued and 100 own tokens at 100 per step: 4 steps, 350 tokens.
    named = terms(loads(1, waiting_prefill_tokens=200, running_prefill_tokens=50))
    assert named["queue"] == pytest.approx([(10 + 10) * 250])
    total = named["queue"][0] + named["prefill"][0]
    assert total == pytest.approx(4 * 1000 + 10 * 350)


def test_prefill_in_the_shadow_of_a_longer_queue_delays_nobody():
    state = loads(waiting_prefill_tokens=[150, 0], decoding_requests=[4, 2])
    # 250 tokens on engine 0 are 100 beyond the longest queue of 150; 100 on engine 1 are none.
    assert terms(state)["interference"] == pytest.approx([10 * 100 * 6, 0])


def test_a_cached_prefix_is_worth_more_where_prefixes_come_again():
    state = loads(decoding_requests=[3, 0], cached_tokens=[64, 0], prefix_reuse=0.5)
    assert terms(state)["reuse"] == pytest.approx([0.5 * 10 * 36 * 4, 0.5 * 10 * 100 * 4])


def test_decode_load_counts_heads_and_context():
    state = loads(running_requests=[3, 1], running_tokens=[100, 300])
    decode = terms(state, expected_output_tokens=20.0)["decode"]
    assert decode == pytest.approx([20 * 10 * (3 + 1) / 2, 20 * 10 * (1 + 3) / 2])


def test_lack_of_kv_is_the_time_to_turn_it_over():
    # 1000 blocks of 16 tokens, 40 tokens free, 100 wanted: 60 tokens at 10,000 per second.
    state = loads(kv_blocks_used=[997.5, 0])
    assert terms(state)["admission"] == pytest.approx([60 * 100, 0])


def test_what_is_loaded_is_context_and_kv_and_no_prefill():
    loading = {"waiting_requests": [3, 3], "loading_requests": [3, 3]}
    state = loads(**loading, awaited_kv_tokens=[0, 300], loaded_kv_tokens=[12_000, 0])
    named = terms(state, expected_output_tokens=2.0)
    assert named["queue"] == [0, 0]
    # Three requests each; the mean one has 2,050 tokens.
    assert named["decode"] == pytest.approx([10 * (3 + 12_000 / 2050), 10 * (3 + 300 / 2050)])
    full = loads(kv_blocks_total=100, kv_blocks_used=90, kv_block_tokens=16, awaited_kv_tokens=160)
    assert terms(full)["admission"] == pytest.approx(
        terms(loads(kv_blocks_total=100, kv_blocks_used=100, kv_block_tokens=16))["admission"]
    )


def test_lack_of_slots_is_priced_in_the_context_they_hold():
    state = loads(running_requests=[64, 0], running_tokens=[6400, 0])
    assert terms(state)["admission"] == pytest.approx([1 * 100 * 100, 0])


def test_expert_pressure_by_feedback_weight():
    state = loads(expert_pressure_us=[500, 0])
    assert terms(state)["expert"] == pytest.approx([0, 0])
    state = state._replace(feedback_weight=2.0)
    assert terms(state, tokens=150)["expert"] == pytest.approx([2000, 0])


def test_unacknowledged_work_counts_without_its_cached_part():
    state = loads(unacked_requests=[2, 0], unacked_tokens=[300, 0], unacked_cached_tokens=[100, 0])
    assert terms(state)["queue"] == pytest.approx([(10 + 10) * 200, 0])


def test_unknown_speeds_order_by_tokens():
    blank = dict.fromkeys((field.name.lower() for field in Field), 0)
    state = loads(**blank | {"waiting_prefill_tokens": [500, 0]})
    costs = POLICIES.build("gimbal").costs(request(), state)
    assert costs[0] > costs[1]
    assert np.isfinite(costs).all()


@pytest.mark.parametrize("engines", [2, 8, 64])
@pytest.mark.parametrize("policy", list(POLICIES))
def test_equal_engines_take_turns(policy, engines):
    rng = np.random.default_rng(7)
    alike = {name: values[0] for name, values in QUEUED.items()}
    held = float(rng.integers(1, 9999))
    state = loads(engines, **alike, running_tokens=held, step_base_us=12345.678)
    costs = POLICIES.build(policy).costs(request(217), state)
    assert [argmin_rotating(costs, turn) for turn in range(engines)] == list(range(engines))


def test_unknown_policy_names_the_nearest():
    with pytest.raises(InputError, match="did you mean 'lmetric'"):
        POLICIES.build("lmetrik")
