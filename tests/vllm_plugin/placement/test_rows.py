"""Rows of ranks to counts of engines."""

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


@pytest.mark.parametrize(
    ("raw", "ranks_per_source", "expected"),
    [
        ([ONE, OTHER], 1, Sources.PER_RANK),
        ([ONE, ONE], 1, Sources.UNKNOWN),
        ([ONE, ONE, OTHER, OTHER], 2, Sources.PER_ENGINE),
        ([ONE, OTHER, ONE, OTHER], 2, Sources.PER_RANK),
        ([ONE, ONE, ONE, ONE], 2, Sources.UNKNOWN),
        ([ONE, ONE], 2, Sources.PER_ENGINE),  # one engine of TP=2
        ([0 * ONE, 0 * ONE], 1, Sources.PER_RANK),  # no traffic says nothing
        ([ONE, 0 * ONE], 1, Sources.PER_RANK),
    ],
)
def test_equal_rows_tell_who_counts(raw, ranks_per_source, expected):
    assert who_counts(np.array(raw), ranks_per_source) is expected


def test_sequence_parallel_ranks_add_up_and_tensor_parallel_ranks_do_not():
    added = per_source(rows([ONE, OTHER, OTHER, ONE + 2], [5, 5, 5, 5]), 2)
    np.testing.assert_allclose(added.routing.counts[0], 2 * (ONE + OTHER))
    once = per_source(rows([ONE, ONE, OTHER, OTHER], [5, 5, 5, 5]), 2)
    np.testing.assert_allclose(once.routing.counts, [2 * ONE, 2 * OTHER])
    assert added.routing.steps == 5


def test_unknown_sources_become_one():
    counts = per_source(rows([ONE, ONE], [5, 5]), 1)
    assert counts.sources is Sources.UNKNOWN
    assert counts.routing.counts.shape == (1, 2, 3)
    np.testing.assert_allclose(counts.routing.counts[0], 2 * ONE)


def test_activity_is_per_step_of_the_group():
    """An engine idle in half the group's steps activates its experts half as often."""
    counts = per_source(rows([ONE, OTHER], [10.0, 5.0], [ONE * 0 + 10.0, OTHER * 0 + 5.0]), 1)
    np.testing.assert_allclose(counts.routing.active[0], 1.0)
    np.testing.assert_allclose(counts.routing.active[1], 0.5)
    union = per_source(rows([ONE, OTHER], [10.0, 10.0], [ONE * 0 + 5, OTHER * 0 + 5]), 2)
    np.testing.assert_allclose(union.routing.active, 0.75)


def test_decayed_steps_are_rounded_without_changing_pairs_per_step():
    counts = per_source(rows([ONE, OTHER], [2.4, 1.0]), 1)
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
)
def test_whatever_comes_becomes_finite_counts_or_one_error(gathered, ranks_per_source):
    if len(gathered) % ranks_per_source:
        ranks_per_source = 1
    try:
        counts = per_source(split_rows(gathered, 2, 3), ranks_per_source)
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
    counts = per_source(rows(raw, [100] * len(raw), squares=squares), ranks_per_source)
    large, small = counts.kinds
    assert 1 / large.size == pytest.approx(expected, rel=1e-3)
    assert small.size == pytest.approx(0.5), "half of the pairs are decodes"
