"""Whole simulated runs: determinism, conservation, and effects that must show."""

import dataclasses

import numpy as np
import pytest

from gimbal.core.errors import InputError
from gimbal.report.arms import Arm, get_arm
from gimbal.sim.cluster import cluster_names, load_cluster
from gimbal.sim.routing import (
    Population,
    RoutingTables,
    linear_placement,
    make_population,
    named_population,
)
from gimbal.sim.run import Simulation
from gimbal.workloads.trace import TraceRequest, make_trace

CLUSTER, PROFILE = load_cluster("h100x4-paper")
POPULATION = make_population(PROFILE)


def long_tailed(count=300, rate=20.0, seed=0):
    rng = np.random.default_rng(seed)
    arrivals = np.cumsum(rng.exponential(1 / rate, count))
    prompts = np.clip(rng.lognormal(5.5, 1.3, count), 8, 12000).astype(int)
    outputs = np.clip(rng.exponential(60, count), 1, 400).astype(int)
    rows = [
        TraceRequest(a, int(p), int(o)) for a, p, o in zip(arrivals, prompts, outputs, strict=True)
    ]
    return make_trace("long-tailed", rows)


def run(arm, trace=None, cluster=CLUSTER, seed=0):
    chosen = trace if trace is not None else long_tailed()
    return Simulation(chosen, cluster, PROFILE, POPULATION, get_arm(arm), seed).run()


def ttft(result):
    return np.array([r.first_token_s - r.arrival_s for r in result.records])


@pytest.mark.parametrize("arm", ["vllm-no-eplb", "round-robin", "gimbal-dp", "hrrn"])
def test_every_request_completes_and_runs_repeat_exactly(arm):
    trace = long_tailed()
    first, second = run(arm, trace), run(arm, trace)
    assert first.records == second.records
    assert [r.output_tokens for r in first.records] == [r.output_tokens for r in trace.requests]
    assert (ttft(first) > 0).all()


def test_an_engine_alone_decodes_at_the_profile_step_time():
    trace = make_trace("one", [TraceRequest(0.0, 100, 200)])
    record = run("round-robin", trace).records[0]
    tpot_ms = (record.last_token_s - record.first_token_s) / 199 * 1e3
    assert 5 < tpot_ms < 8  # about 6 ms on the device plus host time


def step_tokens(arm, profile):
    """[steps] most tokens that an engine had in each step, of a run with medium prompts."""
    rng = np.random.default_rng(5)
    arrivals = np.cumsum(rng.exponential(1 / 40, 400))
    prompts = rng.integers(100, 700, 400)
    rows = [TraceRequest(a, int(p), 60) for a, p in zip(arrivals, prompts, strict=True)]
    trace = make_trace("medium", rows)
    simulation = Simulation(trace, CLUSTER, profile, POPULATION, get_arm(arm), 0)
    steps, done = [], simulation.answering.signals.step_done

    def step_done(batches, duration_us):
        steps.append(max(batch.tokens for batch in batches))
        done(batches, duration_us)

    simulation.answering.signals.step_done = step_done
    records = simulation.run().records
    tpot = [(r.last_token_s - r.first_token_s) / (r.output_tokens - 1) for r in records]
    return np.array(steps), float(np.mean(tpot))


def test_steps_stay_within_cuda_graphs_only_where_that_pays():
    assert PROFILE.graph_tokens == 512

    def just_above(steps):
        return int(((steps > 512) & (steps < 900)).sum())

    plain, plain_tpot = step_tokens("gimbal-no-graphs", PROFILE)
    cut, cut_tpot = step_tokens("gimbal", PROFILE)
    assert just_above(plain) > 50 > 2 * just_above(cut)
    assert cut_tpot < 0.97 * plain_tpot
    # Where launches make no floor, nothing is cut.
    cheap = dataclasses.replace(PROFILE, launch_layer_us=100.0)
    same, _ = step_tokens("gimbal", cheap)
    assert np.array_equal(same, step_tokens("gimbal-no-graphs", cheap)[0])


def test_asynchronous_scheduling_admits_one_step_later():
    trace = make_trace("two", [TraceRequest(0.0, 2000, 50), TraceRequest(0.06, 100, 2)])
    sync = dataclasses.replace(CLUSTER, async_scheduling=False)
    assert ttft(run("round-robin", trace, sync))[1] < ttft(run("round-robin", trace))[1]


def test_hrrn_lets_long_prompts_through_that_sjf_holds_back():
    rows = [TraceRequest(i * 0.004, 16_000 if i == 60 else 2000, 2) for i in range(400)]
    overload = make_trace("overload", rows)
    long_wait = {arm: ttft(run(arm, overload))[60] for arm in ("vllm", "hrrn", "sjf")}
    assert long_wait["vllm"] < long_wait["hrrn"] < long_wait["sjf"]


def test_a_hot_rank_slows_every_step():
    share = np.zeros((1, PROFILE.model.layers, PROFILE.model.experts))
    share[..., :8] = 1.0  # every token goes to the eight experts of rank 0
    hot = Population(share, ("all",))
    trace = long_tailed(100)
    even = Simulation(trace, CLUSTER, PROFILE, POPULATION, get_arm("vllm-no-eplb")).run()
    skewed = Simulation(trace, CLUSTER, PROFILE, hot, get_arm("vllm-no-eplb")).run()
    assert skewed.balance < 0.3 < even.balance


def test_arms_without_placement_run_under_eplb_where_it_is_enabled():
    soon = dataclasses.replace(CLUSTER, eplb_step_interval=200)
    ours, flags = get_arm("gimbal-dp"), ("--no-enable-eplb",)

    def records(arm, cluster):
        result = Simulation(long_tailed(), cluster, PROFILE, POPULATION, arm).run()
        return result.rebalances, result.records

    moved, under_eplb = records(ours, soon)
    still, by_flag = records(dataclasses.replace(ours, flags=flags), soon)
    assert len(moved) > 0
    assert still == []
    assert records(ours, dataclasses.replace(soon, enable_eplb=False)) == ([], by_flag)
    assert by_flag != under_eplb


def test_options_of_the_configuration_change_a_run():
    def records(**queue):
        config = {"levels": ["dispatch", "queue"], "queue": queue}
        arm = Arm("gimbal-dp", config=config, flags=("--max-num-batched-tokens", "1024"))
        return Simulation(long_tailed(rate=60.0), CLUSTER, PROFILE, POPULATION, arm).run().records

    plain = records()
    assert records(options={"overtake_factor": 1.0, "backlog_factor": 0.0}) != plain
    assert records(max_wait_s=0.05) != plain
    assert records(in_batch=False) != plain


def test_a_shared_prefix_is_prefilled_once_per_engine():
    rows = [TraceRequest(i * 0.5, 4100, 4, prefix_blocks=tuple(range(8))) for i in range(20)]
    shared = make_trace("shared", rows, prefix_block_tokens=512)
    result = run("gimbal-dispatch", shared)
    assert ttft(result)[5:].max() < ttft(result)[0]


def test_tables_conserve_pairs_and_bound_active_experts():
    from gimbal.core.contracts import Topology

    topology = Topology(4, 40, 2)  # 32 redundant experts
    placement = linear_placement(PROFILE.model.layers, PROFILE.model.experts, topology)
    tables = RoutingTables(POPULATION, placement, topology, np.ones(4))
    np.testing.assert_allclose(tables.pairs.sum(axis=2), POPULATION.share.sum(axis=2))
    assert (tables.active <= 40 + 1e-9).all()
    assert (np.diff(tables.active, axis=0) >= -1e-12).all()


def test_population_looks_like_recorded_routing():
    share = POPULATION.share
    peak = np.median(share.max(axis=2) / share.mean(axis=2))
    assert 3 <= peak <= 5
    p = share / share.sum(axis=2, keepdims=True)
    pairs = [(a, b) for a in range(4) for b in range(a)]
    divergence = np.mean([_jensen_shannon(p[a], p[b]) for a, b in pairs])
    assert 0.10 <= divergence <= 0.20


def _jensen_shannon(a, b):
    m = (a + b) / 2
    return np.mean((a * np.log2(a / m) + b * np.log2(b / m)).sum(axis=1) / 2)


@pytest.mark.parametrize("name", cluster_names())
def test_packaged_clusters_load(name):
    cluster, profile = load_cluster(name)
    assert cluster.name == name
    assert profile.model.layers == (4 if name == "cpu-demo" else 48)
    assert named_population(cluster.routing, profile).share.shape[1:] == (
        profile.model.layers,
        profile.model.experts,
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: load_cluster("h100x4"), "did you mean 'h100x4-paper'"),
        (lambda: get_arm("gimball"), "did you mean 'gimbal'"),
        (lambda: named_population("evn", PROFILE), "did you mean 'even'"),
        (
            lambda: run("vllm", make_trace("t", [TraceRequest(0, 2_000_000, 1)])),
            "request 0 needs 2000001 tokens of KV",
        ),
    ],
)
def test_bad_input_says_what_and_where(call, message):
    with pytest.raises(InputError, match=message):
        call()
