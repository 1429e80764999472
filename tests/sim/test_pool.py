"""The oracle of one perfectly balanced pool: what it shares, and that nothing beats it."""

import dataclasses

import numpy as np
import pytest

from gimbal.core.errors import InputError
from gimbal.report.arms import Arm, Simulated, get_arm
from gimbal.sim.cluster import load_cluster
from gimbal.sim.policies import policies_of
from gimbal.sim.routing import make_population
from gimbal.sim.run import Simulation
from gimbal.workloads.trace import TraceRequest, make_trace

CLUSTER, PROFILE = load_cluster("h100x4-paper")
POPULATION = make_population(PROFILE)
POOL = Arm("pool", config={"levels": []}, simulated=Simulated(pool=True))
IN_TURN = get_arm("round-robin")


def run(arm, rows, cluster=CLUSTER, prefix_block_tokens=0):
    cluster = dataclasses.replace(cluster, enable_eplb=False)
    trace = make_trace("t", rows, prefix_block_tokens=prefix_block_tokens)
    return Simulation(trace, cluster, PROFILE, POPULATION, arm).run()


def ttft_s(result):
    return np.array([r.first_token_s - r.arrival_s for r in result.records])


def test_equal_work_on_every_engine_takes_a_pool_as_long():
    rows = [TraceRequest(0.0, 3000, 40)] * CLUSTER.dp
    pool, apart = run(POOL, rows), run(IN_TURN, rows)
    assert pool.step_us == pytest.approx(apart.step_us)
    assert [r.engine for r in pool.records] == [0, 1]


def test_one_prompt_is_spread_over_all_engines():
    rows = [TraceRequest(0.0, 8000, 2)]
    pool, alone = run(POOL, rows), run(IN_TURN, rows)
    assert pool.step_us[0] < 0.75 * alone.step_us[0]
    idle = [TraceRequest(0.0, 8, 30)]  # a token is no less for an idle engine beside it
    assert run(POOL, idle).step_us[5:] == pytest.approx(run(IN_TURN, idle).step_us[5:], rel=0.02)


def test_a_pool_has_the_steps_seats_and_kv_memory_of_all_engines():
    small = dataclasses.replace(CLUSTER, kv_tokens=3200, max_num_seqs=1)
    # In turn the third request goes where the first is, which leaves it no room.
    rows = [TraceRequest(0.0, 1800, 300), TraceRequest(0.0, 100, 100)]
    seats = ttft_s(run(POOL, [*rows, TraceRequest(0.01, 100, 2)], small))
    assert seats[2] > 0.5, "two seats are taken"
    roomy = dataclasses.replace(small, max_num_seqs=8)
    late = [TraceRequest(0.01, 1800, 2)]
    assert ttft_s(run(POOL, [*rows, *late], roomy))[2] < 0.3
    assert ttft_s(run(IN_TURN, [*rows, *late], roomy))[2] > 0.5
    whole = [TraceRequest(0.0, 12_000, 2)]  # a step takes 8192 tokens of each engine
    assert run(POOL, whole).steps < run(IN_TURN, whole).steps


def test_what_one_request_has_computed_all_find():
    blocks = tuple(range(20))
    rows = [TraceRequest(at, 10_240, 2, prefix_blocks=blocks) for at in (0.0, 2.0)]
    pool, apart = (ttft_s(run(arm, rows, prefix_block_tokens=512)) for arm in (POOL, IN_TURN))
    assert pool[1] < 0.5 * pool[0]
    assert apart[1] == pytest.approx(apart[0], rel=0.1)


def test_the_ideal_is_below_what_dispatch_reaches():
    rng = np.random.default_rng(3)
    arrivals = np.cumsum(rng.exponential(1 / 50, 1500))
    rows = [
        TraceRequest(float(a), int(p), int(o))
        for a, p, o in zip(
            arrivals, rng.integers(20, 4000, 1500), rng.integers(2, 300, 1500), strict=True
        )
    ]
    results = {name: run(get_arm(name), rows) for name in ("vllm", "gimbal-dp", "ideal-pool")}
    means = {name: ttft_s(result).mean() for name, result in results.items()}
    assert means["ideal-pool"] < 0.95 * means["gimbal-dp"] < means["vllm"]
    assert all(r.status == "ok" for r in results["ideal-pool"].records)


@pytest.mark.parametrize(
    "arm",
    [
        Arm("a", simulated=Simulated(pool=True)),
        Arm("a", config={"levels": ["dispatch"]}, simulated=Simulated(pool=True)),
        Arm("a", config={"levels": []}, simulated=Simulated(pool=True, affinity="home")),
    ],
)
def test_a_pool_leaves_nothing_to_dispatch(arm):
    with pytest.raises(InputError, match=r"arm a: a pool leaves nothing to"):
        policies_of(arm, CLUSTER)
