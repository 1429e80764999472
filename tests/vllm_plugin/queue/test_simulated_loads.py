"""vLLM's scheduler beside a KV connector and the simulator's decode engine do the same steps."""

import random

import pytest

pytest.importorskip("vllm")
from gimbal.core.queue import ORDERINGS
from gimbal.sim.requests import SimRequest
from gimbal.sim.roles import DecodeEngine
from tests.vllm_plugin import real_scheduler as real
from tests.vllm_plugin.fake_connector import loaded, prefilled_elsewhere

pytestmark = pytest.mark.slow  # importing vLLM takes most of ten seconds


def rows(seed, count=60):
    """(step, prompt tokens, output tokens, steps that its load takes) in order of arrival."""
    rng = random.Random(seed)
    return sorted(
        (rng.randrange(120), rng.randrange(1, 900), rng.randrange(1, 40), rng.randrange(1, 9))
        for _ in range(count)
    )


def played(schedulers, seed, preempts, **size):
    """Per step, of the scheduler and of the engine: tokens, KV blocks in use, waiting requests."""
    scheduler = schedulers(None, connector="NixlConnector", **size | {"blocks": size["blocks"] + 1})
    engine = DecodeEngine(
        0, size["budget"], size["seats"], size["blocks"], 16, ORDERINGS.build("fcfs")
    )
    pool = scheduler.kv_cache_manager.block_pool
    due, seen, under_way = list(enumerate(rows(seed))), [], []
    for step in range(3000):
        while due and due[0][1][0] <= step:
            index, (_, prompt, output, _) = due.pop(0)
            name = f"r{index}"
            scheduler.add_request(prefilled_elsewhere(real.request(name, prompt, output)))
            engine.add(SimRequest(index, name, 0.0, prompt, output, loads=True), float(step))
        if not due and not engine.busy:
            break
        output = scheduler.schedule()
        batch = engine.schedule(float(step))
        under_way += [(step + rows(seed)[r.index][3], r) for r in engine.loads.begun]
        engine.loads.begun.clear()
        _, waiting = scheduler.get_request_counts()
        theirs = output.total_num_scheduled_tokens, size["blocks"] - pool.get_num_free_blocks()
        seen.append(
            ((*theirs, waiting), (batch.tokens, engine.used_blocks, engine.waiting_requests))
        )
        there = [request for ends, request in under_way if ends == step]
        real.finish_step(scheduler, output, loaded(*(r.request_id for r in there)))
        engine.finish_step(batch, float(step))
        for request in there:
            engine.transferred(request)
    assert not due
    assert not scheduler.has_unfinished_requests()
    assert engine.used_blocks == 0
    assert bool(engine.preemptions) == preempts
    return seen


@pytest.mark.parametrize(
    ("seed", "preempts", "size"),
    [
        (1, False, {"blocks": 4000, "budget": 512, "seats": 64}),
        (2, True, {"blocks": 260, "budget": 512, "seats": 64}),
        (3, False, {"blocks": 4000, "budget": 64, "seats": 5}),
        (4, True, {"blocks": 180, "budget": 64, "seats": 16}),
    ],
)
def test_both_do_the_same_steps(schedulers, seed, preempts, size):
    for theirs, ours in played(schedulers, seed, preempts, **size):
        assert ours == theirs
