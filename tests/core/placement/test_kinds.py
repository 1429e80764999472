import numpy as np
import pytest

from gimbal.core.contracts import RoutingCounts, Topology
from gimbal.core.placement.backends import GATHER_BACKEND
from gimbal.core.placement.heuristic import GimbalPlacer, plan
from gimbal.core.placement.kinds import (
    MEAN_STEP,
    StepKind,
    at_kind,
    mixed,
    step_kinds,
    typical_share,
)
from gimbal.core.placement.problem import PlacementProblem

TOPOLOGY = Topology(2, 8)
CURRENT = np.tile(np.arange(16, dtype=np.int32), (4, 1))


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([50.0] * 20, 1.0),
        ([100.0] * 5 + [0.0] * 15, 0.25),
        ([2000.0] + [20.0] * 9, 0.1 * 1.09**2),  # one step holds nine tenths of the tokens
        ([0.0] * 4, 1.0),
    ],
)
def test_how_unlike_the_steps_of_a_window_are(tokens, expected):
    x = np.array(tokens)
    assert typical_share(x.sum(), (x * x).sum(), len(x)) == pytest.approx(expected, rel=1e-3)


def test_two_kinds_keep_the_mean_and_find_both_sizes():
    x = np.array([2000.0] + [20.0] * 9)
    decodes = 20.0 * 10
    share = typical_share(x.sum(), (x * x).sum(), 10)
    large, small = step_kinds(share, decodes / x.sum())
    assert large.share == pytest.approx(0.1, rel=0.1)
    assert large.size * x.mean() == pytest.approx(2000, rel=0.1)
    assert small.size * x.mean() == pytest.approx(20)
    assert large.share * large.size + small.share * small.size == pytest.approx(1.0)


@pytest.mark.parametrize(("typical", "decodes"), [(1.0, 0.3), (0.9, 0.3), (0.1, 1.0)])
def test_steps_that_are_alike_are_one_kind(typical, decodes):
    assert step_kinds(typical, decodes) == MEAN_STEP


def test_without_decodes_only_the_large_steps_count():
    assert step_kinds(0.25, 0.0) == (StepKind(0.25, 4.0),)


def test_a_window_of_fewer_larger_steps_keeps_its_counts():
    counts = np.arange(6.0).reshape(1, 2, 3)
    routing = RoutingCounts(counts, np.full((1, 2, 3), 0.5), steps=40)
    larger = at_kind(routing, StepKind(0.25, 4.0))
    assert larger.steps == 10
    np.testing.assert_array_equal(larger.counts, counts)
    np.testing.assert_allclose(larger.active, 1 - 0.5**4)
    assert at_kind(RoutingCounts(counts, steps=3), StepKind(0.1, 10.0)).steps == 1


def problems(kinds, steps, skew):
    """Two ranks of one source; `skew` of the popularity on the first rank's experts."""
    rng = np.random.default_rng(0)
    popularity = rng.random((4, 16)) + np.where(np.arange(16) < 8, skew, 0.0)
    routing = RoutingCounts(np.round(popularity * 20000)[None], steps=steps)
    return [
        PlacementProblem(
            at_kind(routing, kind),
            TOPOLOGY,
            CURRENT,
            horizon_steps=max(1, round(1e6 * kind.share)),
            backend=GATHER_BACKEND,
        )
        for kind in kinds
    ]


def test_one_kind_is_the_plain_plan():
    (only,) = problems(MEAN_STEP, 1000, 1.0)
    ours, plain = GimbalPlacer().plan_kinds([only], MEAN_STEP), GimbalPlacer().plan(only)
    np.testing.assert_array_equal(ours.physical_to_logical, plain.physical_to_logical)
    assert ours.after == plain.after


def test_a_kind_that_is_not_every_step_counts_for_its_share():
    """Prefill alone, in uneven steps: a plan's gain is per step of the window, not of those."""
    kinds = step_kinds(0.25, 0.0)
    (large,) = problems(kinds, 20_000, 1.0)
    whole, shared = plan(large), GimbalPlacer().plan_kinds([large], kinds)
    np.testing.assert_array_equal(shared.physical_to_logical, whole.physical_to_logical)
    gain = whole.before.total - whole.after.total
    assert shared.before.total - shared.after.total == pytest.approx(0.25 * gain, rel=1e-6)


def test_what_only_one_kind_of_step_gains_is_found_and_spread_over_all():
    """In steps of hundreds of tokens every expert is read anyway; few-token steps differ."""
    kinds = (StepKind(0.05, 19.0), StepKind(0.95, 0.05))
    both = problems(kinds, 20_000, 1.0)
    ours = GimbalPlacer().plan_kinds(both, kinds)
    small = plan(both[1])
    gain = ours.before.total - ours.after.total
    assert gain > 0
    assert gain >= 0.95 * 0.9 * (small.before.total - small.after.total)
    np.testing.assert_allclose(gain, ours.layer_gain_us.sum())


def test_a_plan_is_never_worse_than_staying_and_mixes_layers():
    kinds = (StepKind(0.2, 4.0), StepKind(0.8, 0.25))
    both = problems(kinds, 2000, 1.0)
    plans = [plan(problem).physical_to_logical for problem in both]
    ours = mixed(both, kinds, plans)
    assert (ours.layer_gain_us >= 0).all()
    for one in plans:
        alone = mixed(both, kinds, [one])
        assert (ours.after.total) <= alone.after.total + 1e-9


def test_another_placers_map_is_priced_as_it_is():
    kinds = (StepKind(0.2, 4.0), StepKind(0.8, 0.25))
    both = problems(kinds, 2000, 0.0)
    worse = np.argsort(-both[0].measured, axis=1).astype(np.int32)  # all hot experts on one rank
    ours = mixed(both, kinds, [worse], keep=False)
    np.testing.assert_array_equal(ours.physical_to_logical, worse)
    assert ours.after.load > ours.before.load
