"""Reads one field of one row, or says which file, line, field and value is wrong."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gimbal.core.errors import InputError, nearest
from gimbal.core.files import lines, read_text
from gimbal.core.json_text import parse_json
from gimbal.core.numbers import MOST_SECONDS, MOST_TOKENS, real, shown, whole

MOST_HASH_ID = 2**64 - 1


@dataclass(frozen=True, slots=True)
class Row:
    """One row with its place in the file, so that every complaint names it."""

    path: Path
    line: int
    values: Mapping[str, Any]

    def place(self, field: str) -> str:
        """What a complaint about `field` begins with: file, line number, field."""
        return f"{self.path}:{self.line}: {field}="

    def fail(self, field: str, value: object, expected: str) -> InputError:
        """The error for `field`: file, line number, field, value."""
        return InputError(f"{self.place(field)}{shown(value)}: expected {expected}")

    def get(self, field: str) -> Any:
        """The raw value; raises InputError when it is missing or empty."""
        value = self.values.get(field)
        if value is None or value == "":
            raise self.fail(field, value, "a value")
        return value

    def tokens(self, field: str, least: int = 0) -> int:
        """A number of tokens, at least `least`; see `numbers.whole`."""
        return whole(self.get(field), self.place(field), least, MOST_TOKENS)

    def seconds(self, field: str) -> float:
        """A time of at least zero."""
        return real(self.get(field), self.place(field), 0.0, MOST_SECONDS)

    def text(self, field: str) -> str | None:
        """The value as text, or None when it is absent or empty."""
        value = self.values.get(field)
        return None if value is None or value == "" else str(value)

    def hash_ids(self, field: str) -> tuple[int, ...]:
        """A list of whole numbers of up to 64 bits, empty when the field is absent."""
        value = self.values.get(field)
        if value is None:
            return ()
        expected = "a list of whole numbers from 0 to 2**64 - 1"
        if not isinstance(value, list):
            raise self.fail(field, value, expected)
        for item in value:
            if type(item) is not int or not 0 <= item <= MOST_HASH_ID:
                raise self.fail(field, item, expected)
        return tuple(value)


def csv_rows(path: Path, required: tuple[str, ...]) -> Iterator[Row]:
    """Rows of a CSV file with a header; raises InputError when a required column is missing."""
    reader = csv.DictReader(lines(read_text(path)))
    try:
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
    except csv.Error as error:  # a field of more than 128 KiB, say
        raise InputError(f"{path}:{max(1, reader.reader.line_num)}: not CSV: {error}") from None


def json_rows(path: Path) -> Iterator[Row]:
    """Rows of a JSON-lines file; blank lines are skipped."""
    for line, text in enumerate(lines(read_text(path)), start=1):
        if not text.strip():
            continue
        values = parse_json(text, str(path), line)
        if not isinstance(values, dict):
            raise Row(path, line, {}).fail("row", text.strip(), "a JSON object")
        yield Row(path, line, values)
