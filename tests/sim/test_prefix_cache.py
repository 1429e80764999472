"""The simulated prefix cache keeps its accounts, whatever comes."""

from hypothesis import given, settings
from hypothesis import strategies as st

from gimbal.core.config import QueueConfig
from gimbal.core.queue import ORDERINGS
from gimbal.sim.engine import PLAIN, Engine
from gimbal.sim.requests import SimRequest

requests = st.lists(
    st.tuples(
        st.integers(0, 40),  # step of arrival
        st.integers(0, 3),  # conversation
        st.integers(1, 120),  # prompt tokens
        st.integers(1, 20),  # output tokens
    ),
    max_size=12,
)


@settings(max_examples=150, deadline=None)
@given(
    requests,
    st.integers(40, 90),
    st.sampled_from([2, 4, 8, 10]),
    st.integers(4, 64),
    st.booleans(),
)
def test_every_block_comes_back(rows, blocks, place_tokens, budget, decides):
    queue = QueueConfig() if decides else PLAIN
    ordering = ORDERINGS.build("gimbal" if decides else "fcfs")
    engine = Engine(0, budget, 4, blocks, 4, ordering, queue=queue)
    engine.set_prefix_block_tokens(place_tokens)
    due, done = sorted(rows), []
    for step in range(3000):
        while due and due[0][0] <= step:
            _, conversation, prompt, output = due.pop(0)
            places = -(-prompt // place_tokens)
            answered = -(-(prompt + output) // place_tokens)
            request = SimRequest(len(due), str(len(due)), 0.0, prompt, output)
            request.prefix_blocks = tuple(conversation * 1000 + i for i in range(places))
            request.answered_blocks = tuple(conversation * 1000 + i for i in range(answered))
            engine.add(request, float(step))
        done += engine.finish_step(engine.schedule(float(step)), float(step))
        cache = engine._cache
        assert 0 <= engine.used_blocks <= engine.blocks_total
        assert cache.idle_blocks == sum(map(cache._blocks, cache._idle)) <= engine.free_blocks()
        users = [name for r in engine.running.values() for name in r.held]
        assert {name: users.count(name) for name in users} == cache._users
        assert set(cache._users) | set(cache._idle) == set(cache._tokens)
        if not due and not engine.busy:
            break
    assert len(done) == len(rows)
    assert engine.used_blocks == 0


def test_what_runs_is_found_by_the_next_one_and_counted_once():
    engine = Engine(0, 64, 4, 100, 4, ORDERINGS.build("fcfs"))
    engine.set_prefix_block_tokens(8)
    for index in range(2):
        engine.add(SimRequest(index, str(index), 0.0, 41, 9, prefix_blocks=(1, 2, 3, 4, 5, 6)), 0.0)
    assert engine.schedule(0.0).prefill_tokens == 41 + 1
    assert engine.used_blocks == 10 + 1 + 1


def test_a_prompt_of_the_whole_cache_that_is_found_whole_is_admitted():
    engine = Engine(0, 64, 4, 6, 4, ORDERINGS.build("fcfs"))
    engine.set_prefix_block_tokens(8)
    for index in range(2):
        engine.add(SimRequest(index, str(index), 0.0, 24, 1, prefix_blocks=(1, 2, 3)), 0.0)
        computed = engine.schedule(0.0)
        assert computed.prefill_tokens == (4 if index else 24)
        assert len(engine.finish_step(computed, 0.0)) == 1
    assert engine.used_blocks == 0
