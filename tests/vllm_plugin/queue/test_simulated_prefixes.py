"""vLLM's scheduler and the simulator's engine find, share and evict the same prefixes."""

import random

import pytest

pytest.importorskip("vllm")
from gimbal.core.queue import ORDERINGS
from gimbal.sim.engine import Engine
from gimbal.sim.requests import SimRequest
from tests.vllm_plugin import real_scheduler as real

pytestmark = pytest.mark.slow  # importing vLLM takes most of ten seconds

SIZE = 16
ANSWER = 7  # the token that `real.finish_step` samples


def names(tokens):
    """A name per place of the prompt `tokens`: the same for the same content up to there."""
    ends = range(SIZE, len(tokens) + 1, SIZE)
    return tuple(hash(tuple(tokens[:end])) for end in ends)


def conversations(seed, count, turns):
    """(step, prompt, output tokens): turns behind two shared system prompts, in order."""
    rng = random.Random(seed)
    systems = [[rng.randrange(10, 500) for _ in range(length)] for length in (160, 333)]
    rows = []
    for _ in range(count):
        tokens, step = list(rng.choice(systems)), rng.randrange(120)
        for _ in range(turns):
            tokens += [rng.randrange(10, 500) for _ in range(rng.randrange(5, 200))]
            output = rng.randrange(2, 30)
            rows.append((step, tuple(tokens), output))
            tokens += [ANSWER] * output
            step += output + rng.randrange(0, 40)
    return sorted(rows)


def played(schedulers, seed, blocks, budget):
    """Tokens per step of the scheduler and of the engine, given the same requests."""
    scheduler = schedulers(None, blocks=blocks + 1, budget=budget, seats=16, prefix_caching=True)
    engine = Engine(0, budget, 16, blocks, SIZE, ORDERINGS.build("fcfs"))
    engine.set_prefix_block_tokens(SIZE)
    due = conversations(seed, 12, 4)
    theirs, ours, found = [], [], 0
    for step in range(3000):
        while due and due[0][0] <= step:
            _, prompt, output = due.pop(0)
            index = 48 - len(due)
            scheduler.add_request(real.request(f"r{index}", len(prompt), output, prompt=prompt))
            simulated = SimRequest(index, f"r{index}", 0.0, len(prompt), output)
            simulated.prefix_blocks = names(prompt)
            simulated.answered_blocks = names((*prompt, *[ANSWER] * output))
            engine.add(simulated, float(step))
        if not due and not (scheduler.has_requests() or engine.busy):
            break
        output = scheduler.schedule()
        real.finish_step(scheduler, output)
        found += sum(r.num_computed_tokens for r in output.scheduled_new_reqs)
        batch = engine.schedule(float(step))
        engine.finish_step(batch, float(step))
        theirs.append(output.total_num_scheduled_tokens)
        ours.append(batch.tokens)
    assert not due
    assert engine.used_blocks == 0
    assert found > 5_000
    return theirs, ours


@pytest.mark.parametrize(("seed", "blocks", "budget"), [(1, 4000, 256), (2, 300, 256)])
def test_both_compute_the_same_tokens_in_every_step(schedulers, seed, blocks, budget):
    theirs, ours = played(schedulers, seed, blocks, budget)
    assert theirs == ours


@pytest.mark.parametrize(
    ("seed", "blocks", "budget"), [(3, 200, 1024), (4, 150, 64), (5, 130, 256)]
)
def test_where_memory_is_short_both_compute_about_the_same(schedulers, seed, blocks, budget):
    """A preempted request's answer is found again by vLLM, and computed again by the simulator."""
    theirs, ours = played(schedulers, seed, blocks, budget)
    assert sum(theirs) == pytest.approx(sum(ours), rel=0.05)
