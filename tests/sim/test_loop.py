"""Feedback in the simulator: where it has a lever, where it has none, what records say of it."""

import dataclasses

import numpy as np
import pytest

from gimbal.core.contracts import RoutingCounts
from gimbal.core.feedback.outlook import MOST_WINDOWS
from gimbal.report.arms import get_arm
from gimbal.sim.experts import Experts
from gimbal.sim.loop import PERIOD_STEPS, Loop
from gimbal.sim.policies import policies_of
from gimbal.sim.routing import Population
from gimbal.sim.run import Simulation
from gimbal.workloads.trace import TraceRequest, make_trace
from reproduction.scenarios import SCENARIOS, built

CLUSTER, PROFILE = built("routed")
# A link as slow as one between nodes, so that bytes weigh against load.
SLOW = dataclasses.replace(
    PROFILE,
    interconnect=dataclasses.replace(PROFILE.interconnect, same_node_bytes_per_us=30_000.0),
)
LAYERS, EXPERTS = PROFILE.model.layers, PROFILE.model.experts


def opposed():
    """Two domains: the first asks for the experts of engine 0's ranks, the second for the rest."""
    share = np.zeros((2, LAYERS, EXPERTS))
    share[0, :, : EXPERTS // 2] = share[1, :, EXPERTS // 2 :] = 8 / (EXPERTS // 2)
    return Population(share, ("left", "right"))


def workload(count=120, rate=40.0):
    rng = np.random.default_rng(3)
    arrivals = np.cumsum(rng.exponential(1 / rate, count))
    names = rng.choice(["left", "right"], count)
    rows = [TraceRequest(t, 900, 60, domain=str(d)) for t, d in zip(arrivals, names, strict=True)]
    return make_trace("opposed", rows)


def run(arm, cluster=CLUSTER, profile=PROFILE, population=None, rate=40.0):
    chosen = opposed() if population is None else population
    simulation = Simulation(workload(rate=rate), cluster, profile, chosen, get_arm(arm))
    return simulation, simulation.run()


def at_home(result):
    """Share of requests on the engine that holds their domain's experts."""
    return np.mean([(r.domain == "right") == (r.engine == 1) for r in result.records])


def test_affinity_sends_domains_to_their_experts_where_bytes_depend_on_it():
    assert at_home(run("gimbal-no-feedback", profile=SLOW, rate=20.0)[1]) < 0.65
    assert at_home(run("gimbal-affinity", profile=SLOW, rate=20.0)[1]) > 0.7
    cluster, profile = built("today")  # all-gather: every rank gets every token anyway
    assert at_home(run("gimbal-affinity", cluster, profile, rate=20.0)[1]) < 0.65


def test_what_stays_at_home_makes_steps_shorter():
    apart = run("gimbal-no-feedback", profile=SLOW, rate=20.0)[1]
    together = run("gimbal-affinity", profile=SLOW, rate=20.0)[1]

    def tpot(result):
        return np.mean([r.last_token_s - r.first_token_s for r in result.records])

    assert tpot(together) < tpot(apart)


def observe(arm, tokens, decodes, cluster=CLUSTER, profile=PROFILE, steps=PERIOD_STEPS):
    experts = Experts(cluster, profile, opposed(), policies_of(get_arm(arm), cluster), 0)
    for _ in range(steps):
        experts.step_us(np.array(tokens, dtype=float), np.array(decodes, dtype=float))
    return experts.loop.pressure_us if experts.loop else None


def test_pressure_lies_on_the_engine_whose_tokens_travel():
    pressure = observe("gimbal", [[0, 500], [0, 500]], [[0, 0], [0, 0]])
    assert pressure[0] > 100 * PROFILE.model.layers * 1e-3
    assert pressure[1] == 0


def test_pressure_comes_after_a_whole_period_and_only_with_feedback():
    tokens = [[0, 500], [0, 500]]
    assert not observe("gimbal", tokens, [[0, 0], [0, 0]], steps=PERIOD_STEPS - 1).any()
    assert observe("gimbal-no-feedback", tokens, [[0, 0], [0, 0]]) is None


def test_owner_pressure_lies_on_the_owner_of_the_hot_rank_even_under_all_gather():
    """The paper's reading; docs/feedback-loop.md says why it cannot help there."""
    cluster, profile = built("today")
    tokens = [[400, 100], [400, 100]]
    pressed = observe("gimbal-owner", tokens, [[0, 0], [0, 0]], cluster, profile)
    assert pressed[0] > 10
    assert pressed[1] == 0
    assert not observe("gimbal", tokens, [[0, 0], [0, 0]], cluster, profile).any()


def test_decode_steps_press_by_distinct_experts_not_by_pairs():
    cluster, profile = built("today")
    tokens = [[30, 10], [30, 10]]
    decode = observe("gimbal-owner", tokens, tokens, cluster, profile)
    loop = Loop(cluster, profile, "owner", 2, 0.0)
    assert loop.pressure_us.shape == (2,)
    prefill = observe("gimbal-owner", np.array(tokens) * 50, np.zeros((2, 2)), cluster, profile)
    assert prefill[0] > 5 * decode[0]


def test_placement_hears_for_how_long_the_routing_has_held():
    loop = Loop(CLUSTER, PROFILE, "sending", 2, 0.0)
    hot = np.arange(1.0, EXPERTS + 1) * np.ones((2, LAYERS, 1))
    mix = np.array([[500.0, 500.0], [500.0, 500.0]])
    seen = [hot, hot, hot[:, :, ::-1].copy()]
    unproven = [loop.plan_for(RoutingCounts(rows), mix, None)[1] for rows in seen]
    assert unproven == [1, 1, 1]
    loop.realized(100.0, 100.0)
    windows = [loop.plan_for(RoutingCounts(rows), mix, None)[1] for rows in seen]
    assert windows == pytest.approx([1, MOST_WINDOWS, 1])


def test_with_affinity_the_mix_of_domains_says_how_long():
    loop = Loop(CLUSTER, PROFILE, "sending", 2, 0.0)
    counts = RoutingCounts(np.ones((2, LAYERS, EXPERTS)))
    mix = np.array([[500.0, 500.0], [500.0, 500.0]])
    cost = np.array([[0.0, 1.0], [1.0, 0.0]])
    loop.realized(100.0, 100.0)
    windows = [loop.plan_for(counts, mix, cost)[1] for _ in range(4)]
    windows.append(loop.plan_for(counts, mix * [[3.0, 0.1], [0.1, 3.0]], cost)[1])
    assert windows == [1, 2, 3, 4, 1]


def test_realized_gain_is_measured_on_the_steps_that_ran():
    share = np.full((1, LAYERS, EXPERTS), 4 / (EXPERTS - 8))
    share[:, :, :8] = 0.5  # eight hot experts on rank 0
    cluster = dataclasses.replace(built("today")[0], eplb_step_interval=400)
    _, result = run("gimbal-no-feedback", cluster, built("today")[1], Population(share, ("all",)))
    first = result.rebalances[0]
    assert first.committed
    assert first.time_s > 0
    assert first.balance_after > first.balance_before
    assert first.realized_gain_us_per_step > 0.2 * first.predicted_gain_us_per_step > 0


@pytest.mark.parametrize("arm", ["moe-tuner", "sem-moe"])
def test_oracles_place_before_the_run_and_never_move(arm):
    simulation, result = run(arm)
    before = Simulation(
        workload(), CLUSTER, PROFILE, opposed(), get_arm("vllm-no-eplb")
    ).answering.experts.placement
    assert result.rebalances == []
    assert (simulation.answering.experts.placement != before).any()
    if arm == "sem-moe":
        assert at_home(result) > 0.8 or at_home(result) < 0.2


@pytest.mark.parametrize("name", SCENARIOS)
def test_scenarios_build(name):
    cluster, profile = built(name)
    assert (cluster.dp, cluster.tp, cluster.ranks) == (2, 2, 4)
    assert (profile.backend != "allgather_reducescatter") == (name == "routed")


def test_placement_plans_for_prefill_and_decode_steps():
    """Few large steps among many small ones, as the window saw them."""
    experts = Simulation(
        workload(), CLUSTER, PROFILE, opposed(), get_arm("gimbal-ep")
    ).answering.experts
    decodes = np.full((2, 2), 20.0)
    for step in range(100):
        tokens = np.full((2, 2), 2000.0 if step % 10 == 0 else 20.0)
        experts.step_us(tokens, decodes)
    large, small = experts._kinds()
    assert large.share == pytest.approx(0.1, rel=0.1)
    assert small.size * experts._window.sum() / 100 == pytest.approx(4 * 20.0)
