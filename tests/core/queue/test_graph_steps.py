import pytest
from hypothesis import given
from hypothesis import strategies as st

from gimbal.core.queue.graph_steps import (
    EXPLORE,
    FARTHEST,
    LEAST_STEPS,
    REMEMBERED,
    GraphStepCosts,
    fits_graph_steps,
)


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
        for prefill in (0, 40 * (i % 10), 500 + 53 * (i % 25)):
            tokens = prefill + decodes
            us = 10_000 + 10 * prefill + 30 * decodes
            if tokens > graph:
                us = max(us, large_floor_us)
            learned.observe(decodes, us, prefill, tokens)
    return learned


@pytest.mark.parametrize(
    ("floor_us", "backlog", "expected"),
    [
        (25_000, 700, True),  # 7 ms against 14
        (25_000, 1000, True),
        (25_000, 1800, False),  # 18 ms against 14: more small steps delay more
        (15_000, 1000, False),
        (0, 700, False),  # no floor, so no gain
    ],
)
def test_small_steps_pay_where_launches_make_a_floor(floor_us, backlog, expected):
    assert costs(floor_us).small_steps_pay(backlog) is expected


@pytest.mark.parametrize(
    ("floor_us", "expected"),
    [
        (25_000, 1664),  # 10 + 0.7 + 0.01 * 1664 = 27.3 ms, a tenth more than the floor
        (0, 640),  # the smallest size that no graph covers
    ],
)
def test_how_much_a_step_holds_while_launches_make_it_long(floor_us, expected):
    assert costs(floor_us, steps=300).flat_tokens == expected


def test_one_size_more_than_was_seen_is_tried_until_it_takes_longer():
    learned = GraphStepCosts(512)
    assert learned.flat_tokens == 0
    sizes = []
    for _ in range(20):
        tokens = learned.flat_tokens or 600
        sizes.append(tokens)
        for _ in range(3):
            learned.observe(20, max(25_000.0, 20.0 * tokens), tokens - 1, tokens + 20)
    assert sizes[:3] == [600, 768, 896]
    assert sizes[-1] == sizes[-2] == 1280, "with 1,408 it took more than a tenth longer"


def test_a_stall_among_steps_of_a_size_is_not_how_long_they_take():
    learned = GraphStepCosts(512)
    for us in (25_000, 25_100, 600_000):
        for tokens in (600, 700, 800):
            learned.observe(20, us, tokens, tokens + 20)
    assert learned.flat_tokens == 1024


def test_nothing_is_said_before_both_kinds_of_step_were_seen():
    learned = GraphStepCosts(512)
    for prefill in (100, 700):
        for _ in range(LEAST_STEPS):
            assert not learned.small_steps_pay(600)
            learned.observe(10, 11_000.0 if prefill == 100 else 25_000.0, prefill, prefill + 10)
    assert learned.small_steps_pay(600)


def test_much_larger_steps_say_nothing_about_one():
    learned = GraphStepCosts(512)
    for prefill in (100, 600 + 512 + 128):
        for _ in range(LEAST_STEPS):
            learned.observe(10, 11_000.0 if prefill == 100 else 90_000.0, prefill, prefill + 10)
    assert not learned.small_steps_pay(600)


def steps_without_a_floor(learned, count=400):
    for i in range(count):
        learned.observe(20, 10_000 + 10 * (i % 400), i % 400, i % 400 + 20)


def test_stalls_among_the_first_large_steps_are_no_floor():
    learned = GraphStepCosts(512)
    steps_without_a_floor(learned)
    for i in range(LEAST_STEPS):
        learned.observe(20, 16_000 + 500_000 * (i % 3 == 0), 600, 620)
    assert not learned.small_steps_pay(700)


def cut(learned, backlog):
    """Whether a step is cut, as `step.decide` and its caller go about it."""
    exploring, pays = learned.exploring, learned.small_steps_pay(backlog)
    if pays:
        learned.decided()
    return pays and not exploring


def test_a_wrong_beginning_is_unlearned():
    """All first large steps were stalled: one decision in so many lets another one through."""
    learned = GraphStepCosts(512)
    steps_without_a_floor(learned)
    for _ in range(LEAST_STEPS):
        learned.observe(20, 516_000, 600, 620)
    said = []
    for _ in range(EXPLORE * REMEMBERED):
        said.append(cut(learned, 600))
        if not said[-1]:
            learned.observe(20, 16_000, 600, 620)
    assert all(said[:EXPLORE])
    assert not any(said[-EXPLORE:])


def test_a_large_step_is_let_through_when_none_was_seen_for_long():
    learned = costs(25_000)

    def said(count):
        return [cut(learned, 700) for _ in range(count)]

    assert all(said(EXPLORE))
    assert not any(said(3))  # until somebody's large step has been seen
    learned.observe(23, 25_000, 700, 723)
    assert all(said(EXPLORE // 2))
    learned.observe(23, 25_000, 600, 623)  # of another engine: as good as an own one
    assert all(said(EXPLORE))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), -1.0])
@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("step", [(20, 10_700.0, 100, 120), (20, 25_000.0, 700, 720)])
def test_a_step_with_a_figure_that_is_none_teaches_nothing(step, place, bad):
    learned, untold = costs(25_000), costs(25_000)
    for _ in range(50):
        learned.observe(*(bad if i == place else figure for i, figure in enumerate(step)))
    backlogs = range(0, 2048, 100)
    assert [learned.small_steps_pay(b) for b in backlogs] == [
        untold.small_steps_pay(b) for b in backlogs
    ]
    assert learned._small.steps == untold._small.steps


def test_steps_that_could_not_have_been_small_are_not_remembered():
    learned, far = costs(25_000), FARTHEST * 512
    for _ in range(200):
        learned.observe(0, 1.0, far, far)
        learned.observe(600, 1.0, 0, 600)  # decodes alone, more than a graph covers
    assert learned.small_steps_pay(700)
