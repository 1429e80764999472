"""The compiled expert time against the cost model's own formula."""

import dataclasses

import numpy as np
import pytest

from gimbal.core.cost.profile import load_profile
from gimbal.core.cost.step import moe_us
from gimbal.report.arms import get_arm
from gimbal.sim.cluster import load_cluster
from gimbal.sim.experts import Experts
from gimbal.sim.policies import policies_of
from gimbal.sim.routing import GRID, make_population


@pytest.mark.parametrize("name", ["h100x4-paper", "cpu-demo"])
@pytest.mark.parametrize("index", [0, 12, 30])
def test_expert_time_is_the_cost_model_s(name, index):
    cluster, profile = load_cluster(name)
    population = dataclasses.replace(make_population(profile), burstiness=0.0)
    policies = policies_of(get_arm("vllm"), cluster)
    experts = Experts(cluster, profile, population, policies, 0)
    tokens = np.full((cluster.dp, 4), GRID[index] / (4 * cluster.dp))
    tables = experts._tables
    pairs = np.tensordot(tokens.sum(axis=0), tables.pairs, axes=1)
    active = np.minimum(tables.active_at(tokens.sum()), pairs)
    want = moe_us(profile, active, pairs, tokens.sum())
    assert experts.step_us(tokens, tokens * 0) == pytest.approx(want, rel=1e-9)


def test_the_h100_profile_has_a_norm_that_is_not_one():
    assert load_profile("h100-qwen3-30b-a3b").moe.norm != 1.0  # else the test above proves little
