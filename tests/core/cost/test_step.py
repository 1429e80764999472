"""The step-time model against the worked numbers of public tables, and its own algebra."""

import dataclasses

import numpy as np
import pytest

from gimbal.core.cost.profile import (
    dump_profile,
    load_profile,
    parse_profile,
    profile_names,
    slowed,
)
from gimbal.core.cost.step import BatchShape, expected_active, migration_us, step_time
from gimbal.core.errors import InputError

H100 = load_profile("h100-qwen3-30b-a3b")


def shape(tokens, kv=(0, 0), pairs=(0, 0), prefix=(0, 0), sampled=(0, 0)):
    return BatchShape(*(np.array(v, dtype=float) for v in (tokens, kv, pairs, prefix, sampled)))


def balanced(tokens, ep=4, layers=48):
    """Active experts and pairs per layer and rank when 128 experts are equally popular."""
    share = np.full(128, 8 / 128)
    active = expected_active(share, tokens).reshape(ep, -1).sum(axis=1)
    pairs = np.full(ep, tokens * 8 / ep)
    return np.tile(active, (layers, 1)), np.tile(pairs, (layers, 1))


@pytest.mark.parametrize(
    ("batch", "gpu_ms"),
    [
        # Table interpolation of the same kernels (power-law routing), DP=2 TP=2 EP=4.
        (shape((1, 1), kv=(1024, 1024), sampled=(1, 1)), 5.9),
        (shape((32, 32), kv=(32 * 1024,) * 2, sampled=(32, 32)), 10.6),
        (shape((128, 128), kv=(128 * 1024,) * 2, sampled=(128, 128)), 14.9),
        (shape((2048, 2048), pairs=(2048**2 / 2,) * 2, sampled=(1, 1)), 41.3),
    ],
)
def test_worked_steps_of_the_paper_layout(batch, gpu_ms):
    device_only = dataclasses.replace(H100, host_us=0, host_per_request_us=0, launch_layer_us=0)
    got = step_time(device_only, batch, *balanced(batch.tokens.sum())).total_us / 1e3
    assert got == pytest.approx(gpu_ms, rel=0.20)


def test_a_machine_half_as_fast_takes_twice_as_long():
    batch = shape((300, 20), kv=(0, 4000), pairs=(4e4, 0), sampled=(1, 20))
    slow = step_time(slowed(H100, 2.0), batch, *balanced(320)).total_us
    assert slow == pytest.approx(2 * step_time(H100, batch, *balanced(320)).total_us)
    assert migration_us(slowed(H100, 2.0), 100, 4) == pytest.approx(2 * migration_us(H100, 100, 4))


def test_the_slowest_rank_sets_the_step():
    active, pairs = balanced(100)
    even = step_time(H100, shape((600, 600)), active, pairs)
    uneven = step_time(H100, shape((1000, 200)), active, pairs)
    assert uneven.dense_us > even.dense_us
    skewed = pairs.copy()
    skewed[:, 0] *= 8
    assert step_time(H100, shape((600, 600)), active, skewed).moe_us > even.moe_us


def test_eager_steps_last_at_least_their_launches():
    small = step_time(H100, shape((513, 1)), *balanced(514))
    assert small.total_us - small.host_us >= 48 * H100.launch_layer_us


def test_expected_active_is_a_union_bound():
    p = np.array([0.0, 0.25, 1.0])
    np.testing.assert_allclose(expected_active(p, 2), [0, 1 - 0.75**2, 1], atol=1e-6)


def test_one_rearrangement_costs_what_the_paper_reports():
    assert migration_us(H100, 0.75 * 48 * 32, 48) / 1e6 == pytest.approx(0.72, rel=0.08)


@pytest.mark.parametrize("name", profile_names())
def test_packaged_profiles_round_trip(name):
    import yaml

    profile = load_profile(name)
    assert parse_profile(yaml.safe_load(dump_profile(profile)), name) == profile


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("h100-qwen3-30b-a3", "did you mean 'h100-qwen3-30b-a3b'?"),
        ("missing.yaml", "no such file"),
    ],
)
def test_unknown_profiles_are_refused(name, message):
    with pytest.raises(InputError, match=message.replace("?", r"\?")):
        load_profile(name)
