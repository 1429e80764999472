"""vLLM's scheduler and the simulator's engine, fed alike, show core the same step.

Both go through the same arrivals, step by step. In every step the two views are recorded; they and
the decisions made of them must be equal.
"""

import random
from dataclasses import asdict

import pytest

pytest.importorskip("vllm")
from gimbal.core.config import QueueConfig
from gimbal.core.contracts import traits_of
from gimbal.core.queue import ORDERINGS
from gimbal.core.queue import step as core_step
from gimbal.core.queue.budget import StepCost, smoothed_share
from gimbal.core.queue.traits import usable
from gimbal.sim import engine as sim_engine
from gimbal.sim.engine import Engine
from gimbal.sim.requests import SimRequest
from gimbal.sim.step_view import EngineView
from tests.vllm_plugin import real_scheduler as real

pytestmark = pytest.mark.slow  # importing vLLM takes most of ten seconds

RATE_TOKENS_PER_S = 1000.0
STEP_S = 0.05
BLOCKS = 4000


class Recorder:
    """Stands in for `decide` in an adapter's module and keeps what it was asked and said."""

    def __init__(self):
        self.seen = []

    def __call__(self, view, config):
        recorded = core_step.record(view)
        decision = core_step.decide(view, config)
        assert core_step.decide(recorded, config) == decision
        self.seen.append((recorded, decision))
        return decision


def workload(seed, count=40):
    """(step, prompt tokens, output tokens) in order of arrival."""
    rng = random.Random(seed)
    sizes = (20, 80, 300, 1500)
    rows = [(rng.randrange(30), rng.choice(sizes), rng.randrange(2, 9)) for _ in range(count)]
    return sorted(rows)


@pytest.mark.parametrize(
    ("seed", "options", "budget"),
    [
        (1, {}, 256),
        (2, {"options": {"overtake_factor": 2.0}}, 256),
        (3, {"in_batch": False}, 256),
        (4, {"slo_ttft_ms": 400.0, "slo_tpot_ms": 90.0}, 256),
        (5, {"graph_steps": 0.0, "pass_steps": 0}, 256),
        (6, {}, 64),
    ],
)
def test_both_adapters_show_the_same_step(schedulers, monkeypatch, seed, options, budget):
    from gimbal.vllm_plugin.queue import level as level_module
    from gimbal.vllm_plugin.queue.step_view import SchedulerView

    on_server, simulated = Recorder(), Recorder()
    monkeypatch.setattr(level_module, "decide", on_server)
    monkeypatch.setattr(sim_engine, "decide", simulated)
    for view in (SchedulerView, EngineView):  # learned from time, which is not compared here
        monkeypatch.setattr(view, "cost", StepCost(25_000.0, 500.0))
    now = [0.0]
    scheduler = schedulers(
        {"levels": ["queue"], "queue": options},
        blocks=BLOCKS + 1,
        budget=budget,
        seats=48,
    )
    level = scheduler.gimbal_queue
    level.facts.prefill_tokens_per_s = lambda: RATE_TOKENS_PER_S
    level.queue.clock = lambda: now[0]
    config = QueueConfig(**options)
    ordering = ORDERINGS.build(config.ordering, config.options)
    queue = usable(config, traits_of(ordering))
    engine = Engine(0, budget, 48, BLOCKS, 16, ordering, False, queue=queue)
    engine.prefill_rate = RATE_TOKENS_PER_S
    due = workload(seed)
    compared = 0
    for step in range(400):
        now[0] = step * STEP_S
        while due and due[0][0] <= step:
            _, prompt, output = due.pop(0)
            name = f"r{40 - len(due)}"
            scheduler.add_request(real.request(name, prompt, output, arrival=now[0]))
            engine.add(SimRequest(40 - len(due), name, 0.0, prompt, output), now[0])
        if not (scheduler.has_requests() or engine.busy):
            break
        output = scheduler.schedule()
        real.finish_step(scheduler, output)
        engine.view.group.backlog_tokens = engine.backlog_tokens
        batch = engine.schedule(now[0])
        engine.finish_step(batch, now[0] * 1e6)
        group = engine.view.group
        group.prefill_share = smoothed_share(group.prefill_share, batch.prefill_tokens > 0)
        assert output.total_num_scheduled_tokens == batch.tokens, f"step {step}"
        if on_server.seen:
            ours, theirs = simulated.seen[-1], on_server.seen[-1]
            assert asdict(ours[0]) == asdict(theirs[0]), f"step {step}"
            assert ours[1] == theirs[1], f"step {step}"
            compared += bool(on_server.seen[-1][0].running)
        on_server.seen.clear()
        simulated.seen.clear()
    assert not due
    assert compared > 20, "steps with running prefills were compared"
