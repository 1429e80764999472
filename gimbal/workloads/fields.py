"""Records of a file, and one field of one record, or which file, line, field and value is wrong.

A record is a row of a CSV file, a line of a JSON-lines file, an item of a JSON list (one under
``data`` too), or a JSON document as a whole. What a file is shows in its text, not in its name.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Any

from gimbal.core.errors import InputError
from gimbal.core.files import lines, read_text
from gimbal.core.json_text import parse_json
from gimbal.core.numbers import MOST_SECONDS, MOST_TOKENS, real, shown, whole

MOST_HASH_ID = 2**64 - 1
_DATE = re.compile(r"(\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d)(\.\d{1,12})?(Z|[+-]\d\d:\d\d)?", re.ASCII)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Row:
    """One record with its place in the file, so that every complaint names it.

    Attributes:
        line: of the file; of a JSON list or document the number of the record or request.
        values: a field's name with dots in it leads into objects of objects.
    """

    path: Path
    line: int
    values: Mapping[str, Any]

    def place(self, field: str) -> str:
        """What a complaint about `field` begins with: file, line number, field."""
        return f"{self.path}:{self.line}: {field}="

    def fail(self, field: str, value: object, expected: str) -> InputError:
        """The error for `field`: file, line number, field, value."""
        return InputError(f"{self.place(field)}{shown(value)}: expected {expected}")

    def find(self, field: str) -> Any:
        """The raw value; None where there is none."""
        if "." not in field:
            return self.values.get(field)
        value: Any = self.values
        for name in field.split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
        return value

    def get(self, field: str) -> Any:
        """The raw value; raises InputError when it is missing or empty."""
        value = self.find(field)
        if value is None or value == "":
            raise self.fail(field, value, "a value")
        return value

    def tokens(self, field: str, least: int = 0) -> int:
        """A number of tokens, at least `least`; see `numbers.whole`."""
        return whole(self.get(field), self.place(field), least, MOST_TOKENS)

    def seconds(self, field: str, unit_s: float = 1.0) -> float:
        """A time of at least zero, in units of `unit_s` seconds."""
        return real(self.get(field), self.place(field), 0.0, MOST_SECONDS / unit_s) * unit_s

    def date_s(self, field: str) -> float:
        """Seconds since the epoch of a date and time, UTC where it names no offset."""
        value = self.get(field)
        parts = _DATE.fullmatch(value) if isinstance(value, str) else None
        expected = "a date and time"
        if parts is None:
            raise self.fail(field, value, expected)
        try:
            when = datetime.fromisoformat(parts[1] + (parts[3] or "+00:00"))
            return (when - _EPOCH).total_seconds() + float(parts[2] or 0)
        except (ValueError, OverflowError):  # a thirteenth month, an hour 25
            raise self.fail(field, value, expected) from None

    def text(self, field: str) -> str | None:
        """The value as text, or None when it is absent or empty."""
        value = self.find(field)
        return None if value is None or value == "" else str(value)

    def array(self, field: str) -> list[Any]:
        """A list; raises InputError for anything else."""
        value = self.get(field)
        if not isinstance(value, list):
            raise self.fail(field, value, "a list")
        return value

    def hash_ids(self, field: str) -> tuple[int, ...]:
        """A list of whole numbers of up to 64 bits, empty when the field is absent."""
        value = self.find(field)
        if value is None:
            return ()
        expected = "a list of whole numbers from 0 to 2**64 - 1"
        if not isinstance(value, list):
            raise self.fail(field, value, expected)
        for item in value:
            if type(item) is not int or not 0 <= item <= MOST_HASH_ID:
                raise self.fail(field, item, expected)
        return tuple(value)


def records(path: Path) -> tuple[Collection[str], Iterator[Row]]:
    """The keys of the first record, and all records; raises InputError for an empty file."""
    text = read_text(path)
    start = text.lstrip()[:1]
    if start not in ("{", "["):
        return _csv_rows(path, text)
    first_line, _, rest = text.lstrip().partition("\n")
    one_line = not rest.strip()
    if start == "{" and not one_line and first_line.rstrip().endswith("}"):
        rows = _json_rows(path, text)
    else:
        rows = rows_of(path, _items(parse_json(text, str(path), 1 if one_line else None)))
    first = next(rows, None)
    if first is None:
        raise InputError(f"{path}: no request in it")
    return first.values.keys(), chain([first], rows)


def _items(document: Any) -> list[Any]:
    """The records of a JSON document: its items, those of its list ``data``, or itself."""
    if isinstance(document, dict) and isinstance(document.get("data"), list):
        document = document["data"]
    return document if isinstance(document, list) else [document]


def rows_of(path: Path, items: list[Any]) -> Iterator[Row]:
    """Rows of JSON objects, numbered from 1; raises InputError for an item that is none."""
    for number, values in enumerate(items, start=1):
        if not isinstance(values, dict):
            raise Row(path, number, {}).fail("row", values, "a JSON object")
        yield Row(path, number, values)


def _csv_rows(path: Path, text: str) -> tuple[Collection[str], Iterator[Row]]:
    header = text.lstrip().partition("\n")[0]
    reader = csv.reader(lines(text), delimiter=max(",;\t", key=header.count))
    rows = _rows_of_csv(path, reader)
    columns = next(rows, None)
    if columns is None:
        raise InputError(f"{path}: no request in it")
    return columns.values.keys(), rows


def _rows_of_csv(path: Path, reader: Any) -> Iterator[Row]:
    """The header as a row of empty values, then the rows below it; blank lines are skipped."""
    columns: list[str] = []
    try:
        for values in reader:
            if not "".join(values).strip() and len(values) < 2:
                continue
            if not columns:
                columns = [name.strip() for name in values]
                yield Row(path, reader.line_num, dict.fromkeys(columns))
            else:
                row = Row(path, reader.line_num, dict(zip(columns, values, strict=False)))
                if len(values) > len(columns):
                    raise row.fail("row", values[len(columns) :], f"{len(columns)} columns")
                yield row
    except csv.Error as error:  # a field of more than 128 KiB, say
        raise InputError(f"{path}:{max(1, reader.line_num)}: not CSV: {error}") from None


def _json_rows(path: Path, text: str) -> Iterator[Row]:
    """Rows of JSON lines; blank lines are skipped."""
    for line, part in enumerate(lines(text), start=1):
        if not part.strip():
            continue
        values = parse_json(part, str(path), line)
        if not isinstance(values, dict):
            raise Row(path, line, {}).fail("row", part.strip(), "a JSON object")
        yield Row(path, line, values)
