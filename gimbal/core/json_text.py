"""JSON as the standard has it: every number finite, nesting bounded, in and out."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from gimbal.core.errors import InputError
from gimbal.core.files import is_unicode, read_text
from gimbal.core.numbers import DIGITS

DEPTH = 100
"""Deepest nesting that is read; no document of ours comes near."""

_ODD = re.compile(rf"NaN|Infinity|[0-9.]{{{DIGITS + 1}}}|[eE]\+?[0-9]{{3}}|\\u[dD][89a-fA-F]")
"""Text that may hold what is refused: such a document is looked through value by value."""
_ODD_SHAPES = (b"NaN", b"Infinity", b"0" * (DIGITS + 1), b"e000", b"\\ud", b"\\uD")
_SHAPE = bytes(
    {**dict.fromkeys(b"0123456789.", ord("0")), **dict.fromkeys(b"E+", ord("e"))}.get(char, char)
    for char in range(256)
)
"""What `_may_be_odd` sees of a byte: digits are alike, and what stands before an exponent is."""

_WORDS = ("NaN", "Infinity", "-Infinity")


class _Refused(str):
    """A numeral that is no finite number of bounded length."""


def _integer(numeral: str) -> Any:
    return int(numeral) if len(numeral) <= DIGITS else _Refused(numeral)


def _real(numeral: str) -> Any:
    number = float(numeral)
    return number if math.isfinite(number) else _Refused(numeral)


_CAREFUL = json.JSONDecoder(parse_int=_integer, parse_float=_real, parse_constant=_Refused)


def read_object(path: Path, finite: bool = True) -> dict[str, Any]:
    """`read_json` of a file that must hold an object; raises InputError for anything else."""
    document = read_json(path, finite=finite)
    if not isinstance(document, dict):
        raise InputError(f"{path}: expected a JSON object")
    return document


def read_json(path: Path, name: str | Path | None = None, finite: bool = True) -> Any:
    """The document of a file; raises InputError that names it, see `parse_json`."""
    name = path if name is None else name
    return parse_json(read_text(path, name), str(name), finite=finite)


def parse_json(text: str, where: str, line: int | None = None, finite: bool = True) -> Any:
    """The document that `text` is.

    Args:
        where: the file, for complaints.
        line: where `text` stands in it; None: it is the whole file.
        finite: False leaves a NaN or an infinity as the word it is, for documents of other
            programs that hold one where nobody looks.

    Raises InputError for what is no JSON, NaN and infinities (1e400 is one), numerals of more than
    `DIGITS` characters, half a surrogate pair, and nesting beyond `DEPTH`.
    """
    place = where if line is None else f"{where}:{line}"
    careful = _may_be_odd(text) and _ODD.search(text) is not None
    try:
        document = _CAREFUL.decode(text) if careful else json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}:{line or error.lineno}: not JSON: {error.msg}") from None
    except RecursionError:
        raise InputError(f"{place}: nested deeper than {DEPTH} levels") from None
    if careful or text.count("[") + text.count("{") > DEPTH:
        _look_through(document, place, finite)
    return document


def _may_be_odd(text: str) -> bool:
    """Whether `_ODD` could be found in `text`: for most texts no, in a tenth of its time."""
    shape = text.encode(errors="replace").translate(_SHAPE)
    return any(map(shape.__contains__, _ODD_SHAPES))


def _look_through(document: Any, where: str, finite: bool) -> None:
    """Raises InputError for what `parse_json` refuses, naming the value's path."""
    left = [("", document, 1)]
    while left:
        path, value, depth = left.pop()
        if depth > DEPTH and isinstance(value, dict | list):
            raise InputError(f"{where}: nested deeper than {DEPTH} levels")
        if isinstance(value, dict):
            left += [(f"{path}.{_cut(key)}", item, depth + 1) for key, item in value.items()]
            left += [(path, key, depth) for key in value]
        elif isinstance(value, list):
            left += [(f"{path}[{i}]", item, depth + 1) for i, item in enumerate(value)]
        elif isinstance(value, _Refused) and (finite or value not in _WORDS):
            name = path.removeprefix(".") or "document"
            raise InputError(f"{where}: {name}={_cut(value)}: expected a finite number")
        elif isinstance(value, str) and not is_unicode(value):
            name = path.removeprefix(".") or "document"
            raise InputError(f"{where}: {name}: half a surrogate pair: not Unicode text")


def _cut(text: str) -> str:
    return ascii(text)[1:-1] if len(text) <= 40 else ascii(text[:37])[1:-1] + "..."


def to_json(values: Any, **layout: Any) -> str:
    """`values` as JSON; NaN and infinities, which it has not, become null.

    Args:
        layout: ``indent``, ``separators`` and ``sort_keys`` of `json.dumps`.
    """
    try:
        return json.dumps(values, allow_nan=False, **layout)
    except ValueError:
        return json.dumps(_finite(values), allow_nan=False, **layout)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
