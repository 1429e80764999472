"""The counter-based engine against a brute-force recount of its own state."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gimbal.core.queue import ORDERINGS
from gimbal.sim.engine import NEVER, Engine, SimRequest

BLOCK = 4


def make_engine(blocks=40, budget=16, seats=8, ordering="fcfs", **kwargs):
    return Engine(0, budget, seats, blocks, BLOCK, ORDERINGS.build(ordering), **kwargs)


def context(engine, request):
    """KV tokens the request holds, counted from its own history."""
    if request.decode_from_step == NEVER:
        return request.computed
    return request.computed + engine.step - request.decode_from_step


def recount(engine):
    running = list(engine.running.values())
    blocks = sum(-(-context(engine, r) // BLOCK) for r in running)
    decoding = [r for r in running if r.decode_from_step != NEVER]
    kv = sum(context(engine, r) + 1 for r in decoding)
    left = sum(r.target - r.computed for r in engine.prefilling)
    return blocks, len(decoding), kv, left


requests = st.lists(
    st.tuples(st.integers(1, 60), st.integers(1, 30), st.integers(0, 40)), min_size=1, max_size=20
)


@given(requests, st.integers(24, 60), st.integers(4, 32), st.integers(1, 8), st.booleans())
@settings(max_examples=80, deadline=None)
def test_counters_match_a_recount_and_every_request_ends(specs, blocks, budget, seats, in_batch):
    ours = {"ordering": "gimbal", "in_batch": True, "max_wait_s": 20.0} if in_batch else {}
    engine = make_engine(blocks, max(budget, seats + 1), seats, **ours)
    pending = sorted(
        (SimRequest(i, f"r{i}", 0.0, p, o) for i, (p, o, _) in enumerate(specs)),
        key=lambda r: specs[r.index][2],
    )
    finished = []
    for step in range(5000):
        while pending and specs[pending[0].index][2] <= step:
            engine.add(pending.pop(0), float(step), 0)
        batch = engine.schedule(float(step))
        assert batch.tokens <= engine.budget
        assert engine.used_blocks <= engine.blocks_total
        assert len(engine.running) <= seats
        assert batch.decodes == engine.decodes
        finished += engine.finish_step(batch, float(step))
        counted = engine.used_blocks, engine.decodes, engine.kv_tokens
        assert (*counted, engine.remaining_prefill_tokens) == recount(engine)
        if not pending and not engine.busy:
            break
    assert sorted(r.index for r in finished) == list(range(len(specs)))
    for request in finished:
        assert request.generated == request.output_tokens
        assert request.first_token_us <= request.last_token_us
    assert engine.used_blocks == 0


def test_a_long_prompt_is_chunked_by_the_budget():
    engine = make_engine(blocks=100, budget=16)
    request = SimRequest(0, "r0", 0.0, 40, 2)
    engine.add(request, 0.0, 0)
    taken = []
    for step in range(3):
        batch = engine.schedule(float(step))
        taken.append(batch.prefill_tokens)
        engine.finish_step(batch, float(step + 1))
    assert taken == [16, 16, 8]
    assert request.first_token_us == 3.0


@pytest.mark.parametrize(
    ("in_batch", "chunk_limit", "expected"),
    [
        (True, 0, {"long": 11, "short": 5}),
        (False, 0, {"long": 16, "short": 0}),
        (True, 6, {"long": 6, "short": 5}),  # nobody claims more than its longest chunk
    ],
)
def test_a_running_prefill_leaves_budget_to_a_shorter_newcomer(in_batch, chunk_limit, expected):
    engine = make_engine(100, ordering="gimbal", in_batch=in_batch, chunk_limit=chunk_limit)
    prompts = {
        "long": SimRequest(0, "long", 0.0, 60, 2),
        "short": SimRequest(1, "short", 0.0, 5, 2),
    }
    engine.add(prompts["long"], 0.0, 0)
    engine.finish_step(engine.schedule(0.0), 0.0)
    engine.add(prompts["short"], 0.5, 0)
    before = {name: request.computed for name, request in prompts.items()}
    engine.schedule(1.0)
    assert {n: r.computed - before[n] for n, r in prompts.items()} == expected


def test_running_out_of_blocks_preempts_the_latest_and_recomputes():
    engine = make_engine(blocks=6, budget=32)
    for index in range(2):
        engine.add(SimRequest(index, f"r{index}", 0.0, 11, 8), 0.0, 0)
    done = []
    for step in range(60):
        done += engine.finish_step(engine.schedule(float(step)), float(step))
    assert [r.index for r in done] == [0, 1]
    assert engine.preemptions == done[1].preemptions == 1


def test_prefix_blocks_of_finished_prompts_are_not_computed_again():
    engine = make_engine(blocks=100, budget=64)
    engine.set_prefix_block_tokens(8)
    engine.add(SimRequest(0, "a", 0.0, 20, 1, prefix_blocks=(1, 2)), 0.0, 8)
    engine.finish_step(engine.schedule(0.0), 0.0)
    engine.add(SimRequest(1, "b", 1.0, 20, 1, prefix_blocks=(1, 3)), 1.0, 8)
    assert engine.schedule(1.0).prefill_tokens == 12


def test_held_back_prefills_wait_while_decodes_go_on():
    engine = make_engine()
    engine.add(SimRequest(0, "a", 0.0, 4, 5), 0.0, 0)
    engine.finish_step(engine.schedule(0.0), 0.0)
    engine.add(SimRequest(1, "b", 0.0, 4, 5), 0.0, 0)
    batch = engine.schedule(1.0, admit=False)
    assert (batch.decodes, batch.prefill_tokens) == (1, 0)
    assert not engine.capacity_bound  # nobody could have been admitted


def test_prefills_are_not_held_back_where_nothing_decodes():
    engine = make_engine()
    engine.add(SimRequest(0, "a", 0.0, 40, 5), 0.0, 0)
    engine.add(SimRequest(1, "b", 0.0, 40, 5), 0.0, 0)
    assert engine.schedule(0.0, admit=False).prefill_tokens == engine.budget
    assert engine.capacity_bound


@pytest.mark.parametrize("domain", [0, 1])
def test_tokens_are_counted_by_domain(domain):
    engine = make_engine(domains=2)
    engine.add(SimRequest(0, "a", 0.0, 6, 3, domain=domain), 0.0, 0)
    engine.finish_step(engine.schedule(0.0), 0.0)
    assert engine.domain_tokens[domain] == 6
    engine.schedule(1.0)
    np.testing.assert_array_equal(engine.domain_tokens, np.eye(2)[domain])


def test_a_step_may_be_given_less_than_the_whole_budget():
    engine = make_engine()
    engine.add(SimRequest(0, "r0", 0.0, 30, 4), 0.0, 0)
    assert engine.schedule(0.0, budget_tokens=5).prefill_tokens == 5
    assert engine.schedule(1.0).prefill_tokens == 16
