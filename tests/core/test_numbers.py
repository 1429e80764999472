"""Numbers that somebody else wrote: finite and in range, or refused by name."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gimbal.core.errors import InputError
from gimbal.core.numbers import MOST, MOST_COUNT, as_real, as_whole, real, whole

WHAT_EVER = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(min_value=10**300),
    st.floats(),
    st.text(max_size=80),
    st.from_regex(r"[-+0-9.eE_xnainf ]{1,80}", fullmatch=True),
    st.lists(st.integers(), max_size=2),
)


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (3, 3.0),
        (" 2.5 ", 2.5),
        ("-1e-3", -0.001),
        (".5", 0.5),
        ("1e400", None),
        ("nan", None),
        ("inf", None),
        ("1_000", None),  # Python's, nobody else's
        ("１２", None),  # digits to Python only
        ("", None),
        ("1" * 65, None),
        (10**400, None),
        (math.nan, None),
        (True, None),
        ([1], None),
    ],
)
def test_reals(value: object, number: float | None) -> None:
    assert as_real(value) == number


def test_wholes_keep_every_digit() -> None:
    assert as_whole("9007199254740993") == 2**53 + 1
    assert as_whole(2**63 + 1) == 2**63 + 1
    assert as_whole("\x1c077") == as_whole(" 77\n") == 77  # int() strips less than float()
    assert as_whole("12.0") == as_whole("1.2e1") == as_whole(12.0) == 12
    assert as_whole("1.5") is as_whole(True) is as_whole("0x10") is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nan", "f.csv:3: arrival_s=", 0.0), "f.csv:3: arrival_s='nan': expected a number >= 0"),
        ((-1.0, "--load ", 0.0), "--load -1.0: expected a number >= 0"),
        ((2e15, "x="), "x=2000000000000000.0: expected a number <= 1e+15"),
        (("0", "--rate ", -MOST, MOST, 0.0), "--rate '0': expected a number > 0"),
    ],
)
def test_complaints_about_reals(arguments: tuple, message: str) -> None:
    with pytest.raises(InputError) as caught:
        real(*arguments)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("1.5", "n='1.5': expected a whole number >= 1"),
        (0, "n=0: expected a whole number >= 1"),
        (10**54, "n=1" + 54 * "0" + ": expected a whole number <= 9007199254740992"),
        ([1] * 100, "n=[1, 1,"),
    ],
)
def test_complaints_about_wholes(value: object, message: str) -> None:
    with pytest.raises(InputError) as caught:
        whole(value, "n=", 1)
    assert str(caught.value).startswith(message)
    assert len(str(caught.value)) < 200


def test_a_number_too_long_to_print() -> None:
    with pytest.raises(
        InputError, match=r"^n=a number of thousands of digits: expected a whole number <= "
    ):
        whole(10**5000, "n=", 1)


@given(WHAT_EVER)
def test_whatever_is_read_is_finite_and_in_range(value: object) -> None:
    for read, least, most in ((real, -MOST, MOST), (whole, 0, MOST_COUNT)):
        try:
            number = read(value, "here ")
        except InputError as error:
            assert str(error).startswith("here ")  # noqa: PT017
        else:
            assert math.isfinite(number)
            assert least <= number <= most
