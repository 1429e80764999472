"""The one place that reads numbers somebody else wrote: finite, in range, named when they are not.

Values come from trace and record files, YAML and command lines, as numbers or as text. What
stands before the value in a complaint is the caller's: ``trace.csv:12: arrival_s=``, ``--load ``.
"""

from __future__ import annotations

import math
import re

from gimbal.core.errors import InputError

DIGITS = 64
"""Longest numeral that is read; longer ones only cost time (Python refuses 4,300 digits itself)."""
MOST = 1e15
"""Largest magnitude: far beyond every quantity here, and products of several still fit a double."""
MOST_COUNT = 2**53
"""Largest count: a double still tells it from its neighbours."""
MOST_MULTIPLIER = 1e9
"""Of a cost: a sum of costs times this is still finite."""
MOST_TOKENS = 10**9
MOST_SECONDS = 1e12
"""Some 30,000 years; times since 1970 fit."""
MOST_VOCABULARY = 2**24
MOST_LAYERS = 1000
MOST_EXPERTS = 2**13
"""Of one layer."""
MOST_RANKS = 2**12
MOST_REQUESTS = 10**8

_NUMERAL = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?", re.ASCII)


def as_real(value: object) -> float | None:
    """`value`, a number or a decimal numeral, as a finite float; None for anything else."""
    if isinstance(value, str):
        text = value.strip()
        if len(text) > DIGITS or not _NUMERAL.fullmatch(text):
            return None
        value = float(text)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def as_whole(value: object) -> int | None:
    """`value`, a whole number or its numeral, as an int; "12" and 12.0 count, true does not."""
    if type(value) is int:
        return value
    if isinstance(value, str) and len(value) < 16 and value.isascii() and value.isdigit():
        return int(value)  # nearly every field of a trace
    number = as_real(value)
    if number is None or not number.is_integer():
        return None
    if isinstance(value, str) and (text := value.strip()).lstrip("+-").isdigit():
        return int(text)  # beyond 2**53 a float would be another number
    return int(number)


def real(
    value: object,
    where: str,
    least: float = -MOST,
    most: float = MOST,
    above: float | None = None,
) -> float:
    """`value` as a finite number from `least` to `most`, and above `above` where that is given.

    Raises InputError that begins with `where` and the value.
    """
    number = as_real(value)
    if number is None or number < least or (above is not None and number <= above):
        bound = f" > {above:g}" if above is not None else f" >= {least:g}" if least > -MOST else ""
        raise InputError(f"{where}{shown(value)}: expected a number{bound}")
    if number > most:
        raise InputError(f"{where}{shown(value)}: expected a number <= {most:g}")
    return number


def whole(value: object, where: str, least: int = 0, most: int = MOST_COUNT) -> int:
    """`value` as a whole number from `least` to `most`.

    Raises InputError that begins with `where` and the value.
    """
    number = as_whole(value)
    if number is None or number < least:
        raise InputError(f"{where}{shown(value)}: expected a whole number >= {least}")
    if number > most:
        raise InputError(f"{where}{shown(value)}: expected a whole number <= {most}")
    return number


def shown(value: object) -> str:
    """`value` as a complaint shows it: on one line, of bounded length."""
    try:
        text = repr(value)
    except ValueError:  # an int of more digits than Python prints
        text = "a number of thousands of digits"
    return text if len(text) <= 80 else text[:77] + "..."
