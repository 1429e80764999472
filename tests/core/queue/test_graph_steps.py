import pytest
from hypothesis import given
from hypothesis import strategies as st

from gimbal.core.queue.graph_steps import FARTHEST, LEAST_STEPS, GraphStepCosts, fits_graph_steps


@pytest.mark.parametrize(
    ("backlog", "decodes", "most_steps", "expected"),
    [
        (1024, 0, 2.0, True),
        (1025, 0, 2.0, False),
        (800, 112, 2.0, True),
        (801, 112, 2.0, False),
        (200, 384, 2.0, True),
        (200, 385, 2.0, False),  # less than a quarter of the graph is left for prefill
        (200, 600, 2.0, False),
        (1, 0, 0.0, False),
        (512, 0, 1.0, True),
    ],
)
def test_fits(backlog, decodes, most_steps, expected):
    assert fits_graph_steps(backlog, decodes, 512, most_steps) is expected


@given(st.integers(1, 10_000), st.integers(0, 2_000), st.integers(1, 4096), st.floats(0.0, 8.0))
def test_what_fits_is_prefilled_in_so_many_steps(backlog, decodes, graph, most_steps):
    if fits_graph_steps(backlog, decodes, graph, most_steps):
        assert backlog <= most_steps * (graph - decodes)
        assert graph - decodes >= graph / 4


def costs(large_floor_us, steps=60, graph=512):
    """Learned from steps of 10 ms, 10 us a prefill token and 30 us a decode, and of a floor."""
    learned = GraphStepCosts(graph)
    for i in range(steps):
        decodes = 20 + i % 7
        for prefill in (0, 40 * (i % 10), 600 + 53 * (i % 25)):
            tokens = prefill + decodes
            us = 10_000 + 10 * prefill + 30 * decodes
            if tokens > graph:
                us = max(us, large_floor_us)
            learned.observe(prefill, decodes, us, prefill, tokens)
    return learned


@pytest.mark.parametrize(
    ("floor_us", "backlog", "expected"),
    [
        (25_000, 600, True),  # 6 ms against 14
        (25_000, 1000, True),
        (25_000, 1800, False),  # 18 ms either way: nothing to win by more steps
        (15_000, 1000, False),
        (0, 600, False),  # no floor, so no gain
    ],
)
def test_small_steps_pay_where_launches_make_a_floor(floor_us, backlog, expected):
    assert costs(floor_us).small_steps_pay(backlog, 23) is expected


def test_nothing_is_said_before_both_kinds_of_step_were_seen():
    learned = GraphStepCosts(512)
    for kind_tokens in (100, 700):
        for _ in range(LEAST_STEPS):
            assert not learned.small_steps_pay(600, 10)
            us = 11_000.0 if kind_tokens == 100 else 25_000.0
            learned.observe(kind_tokens, 10, us, kind_tokens, kind_tokens + 10)
    assert learned.small_steps_pay(600, 10)


def test_an_engine_learns_from_its_neighbours_large_step():
    learned = costs(25_000)
    for _ in range(40):  # this engine decodes only, while another prefills 700 tokens
        learned.observe(0, 20, 40_000.0, 700, 720)
    assert learned.small_steps_pay(1800, 20)


def test_steps_far_above_the_graphs_say_nothing():
    learned, far = costs(25_000), FARTHEST * 512 + 1
    for _ in range(200):
        learned.observe(far, 0, 1.0, far, far)
    assert learned.small_steps_pay(600, 23)
