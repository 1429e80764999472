"""Rows of ranks to counts of engines."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gimbal.core.errors import InputError
from gimbal.vllm_plugin.placement.rows import (
    PLANES,
    SCALARS,
    Sources,
    per_source,
    row_length,
    split_rows,
    who_counts,
)

RNG = np.random.default_rng(0)
ONE = RNG.integers(1, 9, (2, 3)).astype(float)
OTHER = ONE[::-1] + 1.0


def rows(raw, steps, active=None, squares=0.0):
    raw = np.asarray(raw, dtype=float)
    active = np.zeros_like(raw) if active is None else np.asarray(active, dtype=float)
    planes = np.stack([raw, raw * 2.0, raw, active], axis=1)
    flat = planes.reshape(len(raw), -1)
    none = np.zeros(len(raw))
    scalars = np.stack([np.asarray(steps, float), none + 4.0, none, none + squares], axis=1)
    return split_rows(np.concatenate([flat, scalars], axis=1), *raw.shape[1:])


def test_a_row_is_as_long_as_it_says():
    assert row_length(2, 3) == PLANES * 6 + SCALARS
    back = rows([ONE, OTHER], [5, 3])
    np.testing.assert_array_equal(back.raw, [ONE, OTHER])
    np.testing.assert_array_equal(back.pairs, [2 * ONE, 2 * OTHER])
    assert back.steps.tolist() == [5, 3]
    assert back.recorded.tolist() == [4, 4]


def layer(**facts):
    parallel = SimpleNamespace(is_sequence_parallel=facts.pop("is_sequence_parallel", False))
    return SimpleNamespace(moe_config=parallel, **facts)


@pytest.mark.parametrize(
    ("facts", "ranks_per_source", "expected"),
    [
        ({}, 1, Sources.PER_RANK),
        ({}, 2, Sources.PER_ENGINE),
        ({"is_sequence_parallel": True}, 2, Sources.PER_RANK),
        ({"do_naive_dispatch_combine": True}, 1, Sources.UNKNOWN),
        ({"do_naive_dispatch_combine": True, "is_sequence_parallel": True}, 2, Sources.UNKNOWN),
        ({"is_monolithic": True, "do_naive_dispatch_combine": False}, 2, Sources.UNKNOWN),
    ],
)
def test_what_vllm_does_tells_who_counts(facts, ranks_per_source, expected):
    layers = [layer(), layer(**facts)]
    assert who_counts(layers, ranks_per_source) is expected
    assert who_counts([SimpleNamespace(runner=one) for one in layers], ranks_per_source) is expected


def test_a_layer_that_says_nothing_counts_its_engine_s_tokens():
    assert who_counts([SimpleNamespace()], 1) is Sources.PER_RANK
    assert who_counts([SimpleNamespace()], 4) is Sources.PER_ENGINE


def test_equal_rows_are_two_sources_where_vllm_keeps_them_apart():
    """Random weights can route every token alike, so one window may be equal by chance."""
    counts = per_source(rows([ONE, ONE], [5, 5]), 1, Sources.PER_RANK)
    assert counts.routing.counts.shape == (2, 2, 3)


def test_sequence_parallel_ranks_add_up_and_tensor_parallel_ranks_do_not():
    gathered = rows([ONE, OTHER, OTHER, ONE + 2], [5, 5, 5, 5])
    added = per_source(gathered, 2, Sources.PER_RANK)
    np.testing.assert_allclose(added.routing.counts[0], 2 * (ONE + OTHER))
    once = per_source(rows([ONE, ONE, OTHER, OTHER], [5, 5, 5, 5]), 2, Sources.PER_ENGINE)
    np.testing.assert_allclose(once.routing.counts, [2 * ONE, 2 * OTHER])
    assert added.routing.steps == 5


def test_unknown_sources_become_one():
    counts = per_source(rows([ONE, ONE], [5, 5]), 1, Sources.UNKNOWN)
    assert counts.sources is Sources.UNKNOWN
    assert counts.routing.counts.shape == (1, 2, 3)
    np.testing.assert_allclose(counts.routing.counts[0], 2 * ONE)


def test_activity_is_per_step_of_the_group():
    """An engine idle in half the group's steps activates its experts half as often."""
    gathered = rows([ONE, OTHER], [10.0, 5.0], [ONE * 0 + 10.0, OTHER * 0 + 5.0])
    counts = per_source(gathered, 1, Sources.PER_RANK)
    np.testing.assert_allclose(counts.routing.active[0], 1.0)
    np.testing.assert_allclose(counts.routing.active[1], 0.5)
    gathered = rows([ONE, OTHER], [10.0, 10.0], [ONE * 0 + 5, OTHER * 0 + 5])
    union = per_source(gathered, 2, Sources.PER_RANK)
    np.testing.assert_allclose(union.routing.active, 0.75)


def test_decayed_steps_are_rounded_without_changing_pairs_per_step():
    counts = per_source(rows([ONE, OTHER], [2.4, 1.0]), 1, Sources.PER_RANK)
    assert counts.routing.steps == 2
    np.testing.assert_allclose(counts.routing.counts[0] / 2, 2 * ONE / 2.4)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -1.0, 1e31])
@pytest.mark.parametrize("number", [0, 7, 13, 20, 24, 25, 26, 27])
def test_numbers_that_are_no_counts_are_refused(number: int, value: float):
    gathered = np.ones((3, row_length(2, 3)))
    split_rows(gathered, 2, 3)
    gathered[1, number] = value
    with pytest.raises(InputError, match=f"row of rank 1, number {number}: .* is no count"):
        split_rows(gathered, 2, 3)


@settings(max_examples=200)
@given(
    st.sampled_from([1, 2, 4]).flatmap(
        lambda ranks: hnp.arrays(
            np.float64, (ranks, row_length(2, 3)), elements=st.floats(allow_nan=True)
        )
    ),
    st.sampled_from([1, 2]),
    st.sampled_from(list(Sources)),
)
def test_whatever_comes_becomes_finite_counts_or_one_error(gathered, ranks_per_source, sources):
    if len(gathered) % ranks_per_source:
        ranks_per_source = 1
    try:
        counts = per_source(split_rows(gathered, 2, 3), ranks_per_source, sources)
    except InputError:
        assert not (gathered >= 0.0).all() or gathered.max() > 1e30
        return
    assert np.isfinite(counts.routing.counts).all()
    assert np.isfinite(counts.decode).all()
    assert counts.routing.steps >= 1
    assert all(np.isfinite([kind.share, kind.size]).all() for kind in counts.kinds)


# 100 steps; a rank's pairs (twice its raw counts) lie in ten of them, evenly.
LUMPY = np.full((2, 3), 50.0)


@pytest.mark.parametrize(
    ("raw", "ranks_per_source", "expected"),
    [
        ([LUMPY], 1, 0.1),
        # ranks of an engine in the same steps; two engines in steps of their own
        ([LUMPY, LUMPY * 2], 2, 0.1),
        ([LUMPY, LUMPY * 1.01], 1, 1 / (0.5 * 10 + 0.5)),
    ],
)
def test_large_steps_coincide_within_an_engine_only(raw, ranks_per_source, expected):
    squares = [10 * (2 * np.sum(r) / 10) ** 2 for r in raw]
    gathered = rows(raw, [100] * len(raw), squares=squares)
    counts = per_source(gathered, ranks_per_source, Sources.PER_RANK)
    large, small = counts.kinds
    assert 1 / large.size == pytest.approx(expected, rel=1e-3)
    assert small.size == pytest.approx(0.5), "half of the pairs are decodes"
