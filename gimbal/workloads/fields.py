"""Reads one field of one row, or says which file, line, field and value is wrong."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gimbal.core.errors import InputError, nearest


@dataclass(frozen=True, slots=True)
class Row:
    """One row with its place in the file, so that every complaint names it."""

    path: Path
    line: int
    values: Mapping[str, Any]

    def fail(self, field: str, value: object, expected: str) -> InputError:
        """The error for `field`: file, line number, field, value."""
        return InputError(f"{self.path}:{self.line}: {field}={value!r}: expected {expected}")

    def get(self, field: str) -> Any:
        """The raw value; raises InputError when it is missing or empty."""
        value = self.values.get(field)
        if value is None or value == "":
            raise self.fail(field, value, "a value")
        return value

    def integer(self, field: str, minimum: int = 0) -> int:
        """A whole number of at least `minimum`; "12" and 12.0 count, true and 1.5 do not."""
        value = self.get(field)
        expected = f"a whole number >= {minimum}"
        if isinstance(value, bool):
            raise self.fail(field, value, expected)
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise self.fail(field, value, expected) from None
        if not math.isfinite(number) or number != int(number) or number < minimum:
            raise self.fail(field, value, expected)
        return int(number)

    def seconds(self, field: str) -> float:
        """A finite number of at least zero."""
        value = self.get(field)
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise self.fail(field, value, "a number >= 0") from None
        if isinstance(value, bool) or not math.isfinite(number) or number < 0:
            raise self.fail(field, value, "a number >= 0")
        return number

    def text(self, field: str) -> str | None:
        """The value as text, or None when it is absent or empty."""
        value = self.values.get(field)
        return None if value is None or value == "" else str(value)

    def hash_ids(self, field: str) -> tuple[int, ...]:
        """A list of whole numbers, empty when the field is absent."""
        value = self.values.get(field)
        if value is None:
            return ()
        if not isinstance(value, list):
            raise self.fail(field, value, "a list of whole numbers")
        for item in value:
            if isinstance(item, bool) or not isinstance(item, int):
                raise self.fail(field, item, "a list of whole numbers")
        return tuple(value)


def open_text(path: Path) -> str:
    """The file's text; raises InputError when it cannot be read as UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise InputError(f"{path}: cannot be read: {reason}") from None


def csv_rows(path: Path, required: tuple[str, ...]) -> Iterator[Row]:
    """Rows of a CSV file with a header; raises InputError when a required column is missing."""
    reader = csv.DictReader(open_text(path).splitlines())
    columns = [name.strip() for name in reader.fieldnames or ()]
    reader.fieldnames = columns
    for name in required:
        if name not in columns:
            hint = nearest(name, columns) if columns else ""
            raise InputError(f"{path}:1: column {name!r} is missing{hint}")
    for values in reader:
        row = Row(path, reader.line_num, values)
        if None in values:
            raise row.fail("row", values[None], f"{len(columns)} columns")
        yield row


def json_rows(path: Path) -> Iterator[Row]:
    """Rows of a JSON-lines file; blank lines are skipped."""
    for line, text in enumerate(open_text(path).splitlines(), start=1):
        if not text.strip():
            continue
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            place = Row(path, line, {})
            raise place.fail("row", text[:60], f"a JSON object ({error.msg})") from None
        if not isinstance(values, dict):
            raise Row(path, line, {}).fail("row", text[:60], "a JSON object")
        yield Row(path, line, values)
