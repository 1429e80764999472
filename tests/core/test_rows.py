"""A row holds finite, sensible numbers; what does not is named."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gimbal.core.snapshot import (
    ACCEPTED_REQUESTS,
    ACCEPTED_TOKENS,
    LARGEST,
    ROW_WIDTH,
    Field,
    ImplausibleRow,
    check_row,
    mended,
    plausible,
    row_problem,
)

BAD = [float("nan"), float("inf"), -float("inf"), -1.0, -5e-324, math.nextafter(LARGEST, 1e300)]
GOOD = [0.0, -0.0, 5e-324, 0.5, 1e15, LARGEST]

columns = st.integers(0, ROW_WIDTH - 1)
numbers = st.one_of(st.floats(), st.sampled_from(BAD + GOOD))


def sensible(value: float) -> bool:
    return not math.isnan(value) and 0.0 <= value <= 2.0**53


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize(
    ("column", "name"),
    [
        (Field.SEQUENCE, "sequence"),
        (Field.STEP_TIME_US, "step_time_us"),
        (ACCEPTED_REQUESTS + 3, "accepted_requests[3]"),
        (ACCEPTED_TOKENS, "accepted_tokens[0]"),
        (ROW_WIDTH - 1, "accepted_tokens[15]"),
    ],
)
def test_a_number_that_none_can_have_is_named(column: int, name: str, value: float) -> None:
    row = np.zeros(ROW_WIDTH)
    row[column] = value
    assert row_problem(row) == f"{name} is {value:g}"
    with pytest.raises(ImplausibleRow) as raised:
        check_row(row)
    assert str(raised.value) == row_problem(row)
    assert not plausible(value)


@pytest.mark.parametrize("value", GOOD)
def test_what_a_row_may_hold(value: float) -> None:
    row = np.full(ROW_WIDTH, value)
    assert row_problem(row) is None
    check_row(row)
    assert plausible(value)


def test_no_more_blocks_are_used_than_there_are() -> None:
    row = np.zeros(ROW_WIDTH)
    row[[Field.KV_BLOCKS_USED, Field.KV_BLOCKS_TOTAL]] = 7.0, 7.0
    assert row_problem(row) is None
    row[Field.KV_BLOCKS_USED] = 8.0
    assert row_problem(row) == "kv_blocks_used is 8 of 7"


@given(st.dictionaries(columns, numbers))
def test_rows_are_judged_column_by_column(values: dict[int, float]) -> None:
    row = np.zeros(ROW_WIDTH)
    row[Field.KV_BLOCKS_TOTAL] = LARGEST
    for column, value in values.items():
        row[column] = value
    bad = [column for column in range(ROW_WIDTH) if not sensible(row[column])]
    blocks = row[Field.KV_BLOCKS_USED] > row[Field.KV_BLOCKS_TOTAL]
    assert (row_problem(row) is None) == (not bad and not blocks)
    if bad:
        with pytest.raises(ImplausibleRow):
            check_row(row)
    before = row.copy()
    assert mended(row) == len(bad)
    assert row_problem(row) is None
    good = [column for column in range(ROW_WIDTH) if column not in [*bad, Field.KV_BLOCKS_USED]]
    assert (row[good] == before[good]).all()
