"""The counter-based engine against a brute-force recount of its own state."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gimbal.core.config import QueueConfig
from gimbal.core.queue import ORDERINGS
from gimbal.core.queue.step import LEAST_TOKENS
from gimbal.sim.engine import Engine
from gimbal.sim.requests import NEVER, SimRequest
from gimbal.sim.step_view import Group

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
@settings(max_examples=80)
def test_counters_match_a_recount_and_every_request_ends(specs, blocks, budget, seats, in_batch):
    ours = {"ordering": "gimbal", "queue": QueueConfig(max_wait_s=20.0)} if in_batch else {}
    engine = make_engine(blocks, max(budget, seats + 1), seats, **ours)
    pending = sorted(
        (SimRequest(i, f"r{i}", 0.0, p, o) for i, (p, o, _) in enumerate(specs)),
        key=lambda r: specs[r.index][2],
    )
    finished = []
    for step in range(5000):
        while pending and specs[pending[0].index][2] <= step:
            engine.add(pending.pop(0), float(step))
        batch = engine.schedule(float(step))
        assert batch.tokens <= max(engine.budget, batch.decodes + LEAST_TOKENS)
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
    engine.add(request, 0.0)
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
    queue = QueueConfig(in_batch=in_batch)
    engine = make_engine(100, ordering="gimbal", queue=queue, chunk_limit=chunk_limit)
    prompts = {
        "long": SimRequest(0, "long", 0.0, 60, 2),
        "short": SimRequest(1, "short", 0.0, 5, 2),
    }
    engine.add(prompts["long"], 0.0)
    engine.finish_step(engine.schedule(0.0), 0.0)
    engine.add(prompts["short"], 0.5)
    before = {name: request.computed for name, request in prompts.items()}
    engine.schedule(1.0)
    assert {n: r.computed - before[n] for n, r in prompts.items()} == expected


def test_running_out_of_blocks_preempts_the_latest_and_recomputes():
    engine = make_engine(blocks=6, budget=32)
    for index in range(2):
        engine.add(SimRequest(index, f"r{index}", 0.0, 11, 8), 0.0)
    done = []
    for step in range(60):
        done += engine.finish_step(engine.schedule(float(step)), float(step))
    assert [r.index for r in done] == [0, 1]
    assert engine.preemptions == done[1].preemptions == 1


def test_admission_that_leaves_room_for_growth_preempts_less():
    def preemptions(room_tokens):
        queue = QueueConfig(room_tokens=room_tokens)
        engine = make_engine(blocks=40, budget=64, seats=8, ordering="gimbal", queue=queue)
        for index in range(12):
            engine.add(SimRequest(index, f"r{index}", 0.0, 11, 40), 0.0)
        done = []
        for step in range(2000):
            done += engine.finish_step(engine.schedule(float(step)), float(step))
        assert len(done) == 12
        return engine.preemptions

    assert preemptions(0) > preemptions(16) > preemptions(40) == 0


def test_a_prompt_of_the_whole_cache_is_admitted_once_the_others_have_ended():
    engine = make_engine(blocks=40, budget=64, ordering="gimbal", queue=QueueConfig())
    for index in range(3):
        engine.add(SimRequest(index, f"r{index}", 0.0, 10, 30), 0.0)
    engine.finish_step(engine.schedule(0.0), 0.0)
    engine.add(SimRequest(3, "whole", 0.0, 158, 2), 1.0)
    for index in range(4, 60):  # they may pass it for a while
        engine.add(SimRequest(index, f"r{index}", 0.0, 10, 30), 1.0)
    done = []
    for step in range(1, 2000):
        done += engine.finish_step(engine.schedule(float(step)), float(step))
    assert len(done) == 60
    assert [r.request_id for r in done].index("whole") < 40


def test_prefix_blocks_of_finished_prompts_are_not_computed_again():
    engine = make_engine(blocks=100, budget=64)
    engine.set_prefix_block_tokens(8)
    engine.add(SimRequest(0, "a", 0.0, 20, 1, prefix_blocks=(1, 2)), 0.0)
    engine.finish_step(engine.schedule(0.0), 0.0)
    engine.add(SimRequest(1, "b", 1.0, 20, 1, prefix_blocks=(1, 3)), 1.0)
    assert engine.schedule(1.0).prefill_tokens == 12


def test_the_end_of_a_prompt_leaves_the_cache_before_its_beginning():
    engine = make_engine(blocks=40, budget=128)  # room for ten prefix blocks of 16 tokens
    engine.set_prefix_block_tokens(16)
    computed = []
    for index, first in enumerate((0, 6, 0)):
        blocks = tuple(range(first, first + 6))
        engine.add(SimRequest(index, str(index), 0.0, 96, 1, prefix_blocks=blocks), 0.0)
        before = engine.served_prefill_tokens
        engine.finish_step(engine.schedule(0.0), 0.0)
        computed.append(engine.served_prefill_tokens - before)
    assert computed == [96, 96, 96 - 4 * 16]


def test_held_back_prefills_wait_while_decodes_go_on():
    engine = make_engine()
    engine.add(SimRequest(0, "a", 0.0, 4, 5), 0.0)
    engine.finish_step(engine.schedule(0.0), 0.0)
    engine.add(SimRequest(1, "b", 0.0, 4, 5), 0.0)
    batch = engine.schedule(1.0, due=False)
    assert (batch.decodes, batch.prefill_tokens) == (1, 0)
    assert not engine.capacity_bound  # nobody could have been admitted


def test_prefills_are_not_held_back_where_nothing_decodes():
    engine = make_engine()
    engine.add(SimRequest(0, "a", 0.0, 40, 5), 0.0)
    engine.add(SimRequest(1, "b", 0.0, 40, 5), 0.0)
    assert engine.schedule(0.0, due=False).prefill_tokens == engine.budget
    assert engine.capacity_bound


@pytest.mark.parametrize("domain", [0, 1])
def test_tokens_are_counted_by_domain(domain):
    engine = make_engine(domains=2)
    engine.add(SimRequest(0, "a", 0.0, 6, 3, domain=domain), 0.0)
    engine.finish_step(engine.schedule(0.0), 0.0)
    assert engine.domain_tokens[domain] == 6
    engine.schedule(1.0)
    np.testing.assert_array_equal(engine.domain_tokens, np.eye(2)[domain])


def test_a_step_is_cut_to_what_a_graph_covers():
    graphs = SimpleNamespace(
        graph_tokens=8, exploring=False, flat_tokens=0, small_steps_pay=lambda backlog: True
    )
    group = Group(graphs=graphs)
    engine = make_engine(ordering="gimbal", queue=QueueConfig(), group=group)
    engine.add(SimRequest(0, "r0", 0.0, 2, 4), 0.0)
    engine.finish_step(engine.schedule(0.0), 0.0)
    engine.add(SimRequest(1, "r1", 0.0, 12, 4), 1.0)
    assert engine.schedule(1.0).tokens == 8
    assert engine.decision.asked_graphs
    assert engine.view.memory.graph_steps == 1


def test_small_requests_pass_a_head_without_blocks_for_a_while():
    def first_steps(pass_steps):
        queue = QueueConfig(pass_steps=pass_steps, pass_s=1e9, in_batch=False, room_tokens=0)
        engine = make_engine(blocks=10, budget=64, ordering="fcfs", queue=queue)
        prompts = [SimRequest(0, "run", 0.0, 20, 18), SimRequest(1, "big", 0.0, 30, 2)]
        prompts += [SimRequest(2 + i, f"s{i}", 0.0, 4, 2) for i in range(6)]
        for number, request in enumerate(prompts):
            engine.add(request, number / 100)
        done = []
        for step in range(200):
            done += engine.finish_step(engine.schedule(float(step)), float(step))
        assert len(done) == len(prompts)
        return [r.request_id for r in sorted(prompts, key=lambda r: r.first_token_us)]

    assert first_steps(0)[:2] == ["run", "big"]
    passed = first_steps(8)
    assert passed.index("big") > 2


def test_the_first_prefill_moves_on_where_decodes_fill_the_step():
    engine = make_engine(blocks=200, budget=4, seats=8, ordering="gimbal", queue=QueueConfig())
    for index in range(4):
        engine.add(SimRequest(index, f"d{index}", 0.0, 1, 90), 0.0)
    engine.finish_step(engine.schedule(0.0), 0.0)
    assert engine.decodes == 4
    engine.budget = 5
    engine.add(SimRequest(4, "long", 0.0, 40, 2), 1.0)
    engine.finish_step(engine.schedule(1.0), 1.0)
    engine.budget = 4
    assert engine.schedule(2.0).prefill_tokens == 4 < LEAST_TOKENS  # no chunk exceeds the budget
