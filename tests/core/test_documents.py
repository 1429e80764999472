"""JSON and YAML that somebody else wrote: plain finite values of bounded nesting, or one line."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gimbal.core.errors import InputError
from gimbal.core.files import lines, read_text, write_text
from gimbal.core.json_text import _ODD, _may_be_odd, parse_json, to_json
from gimbal.core.yaml_reader import parse_yaml, read_yaml

BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{own}: &{own} [{', '.join([f'*{below}'] * 10)}]\n"
    for below, own in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = "a: &a {x: 1}\n" + "".join(
    f"{own}: &{own}\n  <<: [{', '.join([f'*{below}'] * 10)}]\n"
    for below, own in zip("abcdefgh", "bcdefghi", strict=True)
)


NO_JSON = [
    ('{"a": [1, NaN]}', "f.json: a[1]=NaN: expected a finite number"),
    ('{"a": {"b": 1e400}}', "f.json: a.b=1e400: expected a finite number"),
    ('{"a": -Infinity}', "f.json: a=-Infinity: expected a finite number"),
    ('{"a": 1' + "0" * 4300 + "}", "f.json: a=1000000000000000000000000000000000000...: "),
    ("[" * 101 + "]" * 101, "f.json: nested deeper than 100 levels"),
    ("[" * 100_000, "f.json: nested deeper than 100 levels"),
    ('{"a": "\\ud800"}', "f.json: a: half a surrogate pair"),
    ('{"a": 1,\n}', "f.json:2: not JSON: "),
    ("", "f.json:1: not JSON: "),
]


@pytest.mark.parametrize(("text", "message"), NO_JSON, ids=[row[1][:60] for row in NO_JSON])
def test_no_json(text: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_json(text, "f.json")
    assert str(caught.value).startswith(message)


def test_json_of_one_line_is_named_by_its_line() -> None:
    with pytest.raises(InputError, match=r"^f:7: arrival_s=NaN: "):
        parse_json('{"arrival_s": NaN}', "f", 7)
    with pytest.raises(InputError, match=r"^f:7: not JSON: "):
        parse_json("{", "f", 7)


@pytest.mark.parametrize(
    "text", ['"NaN"', "[1.0, -2e-5]", '{"\\ud83d\\ude00": 1e300}', "1e-400", "[" * 100 + "]" * 100]
)
def test_json(text: str) -> None:
    assert parse_json(text, "f") == json.loads(text)


def test_what_is_written_is_json() -> None:
    values = {"a": math.nan, "b": (1.5, [math.inf]), 3: "x"}
    assert json.loads(to_json(values)) == {"a": None, "b": [1.5, [None]], "3": "x"}


NO_YAML = [
    ("a: 1\nb: 2\na: 3\n", "f.yaml:3: not YAML (key 'a' is given twice, first in line 1)"),
    ("a:\n  b: 1\n  'b': 2\n", "f.yaml:3: not YAML (key 'b' is given twice, first in line 2)"),
    ("a: 1\nb: .inf\n", "f.yaml:2: not YAML (expected a finite number"),
    ("a: .nan", "f.yaml:1: not YAML (expected a finite number"),
    ("a: 1.0e+400", "f.yaml:1: not YAML (expected a finite number"),
    ("a: 0x" + "f" * 9000, "f.yaml:1: not YAML (expected a finite number"),
    ("a: " + "1" * 5000, "f.yaml:1: not YAML (Exceeds the limit"),
    ("a: 2024-13-45", "f.yaml:1: not YAML (month must be in 1..12"),
    ("a: 2024-12-05", "f.yaml:1: not YAML (a value of type date: quote what is text)"),
    ("a: !!int ''", "f.yaml:1: not YAML (string index out of range"),
    ("a: !!python/object:os.system x", "f.yaml:1: not YAML (could not determine"),
    ("? [a]\n: 1\n", "f.yaml:1: not YAML (expected a key of one word)"),
    ("a: &a [*a]", "f.yaml:1: not YAML (it contains itself)"),
    (BOMB, "f.yaml:6: not YAML (more than 200000 values, aliases written out)"),
    (MERGES, "f.yaml:11: not YAML (more than 200000 values, aliases written out)"),
    ("[" * 60 + "]" * 60, "f.yaml:1: not YAML (more than 50 levels, aliases written out)"),
    ("[" * 9000, "f.yaml: nested deeper than 50 levels"),
    ('a: "\\uD800"', "f.yaml:1: not YAML (half a surrogate pair)"),
    ("a: [", "f.yaml:1: not YAML ("),
    ("a: \x01", "f.yaml: not YAML (special characters are not allowed)"),
]


@pytest.mark.parametrize(("text", "message"), NO_YAML, ids=[row[1][:60] for row in NO_YAML])
def test_no_yaml(text: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_yaml(text, "f.yaml")
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_yaml() -> None:
    assert parse_yaml("", "f") is None
    text = "base: &base {x: 1, y: [a, 2.5]}\nown:\n  <<: *base\n  x: true\n"
    base = {"x": 1, "y": ["a", 2.5]}
    assert parse_yaml(text, "f") == {"base": base, "own": base | {"x": True}}


def test_files_that_are_no_text_are_named(tmp_path: Path) -> None:
    path = tmp_path / "f.yaml"
    with pytest.raises(InputError, match=r"f\.yaml: no such file$"):
        read_text(path)
    with pytest.raises(InputError, match=r"cannot be read: it is a folder$"):
        read_text(tmp_path)
    with pytest.raises(InputError, match=r"^/dev/zero: cannot be read: it is a device$"):
        read_text(Path("/dev/zero"))
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match=r"f\.yaml: cannot be read: not UTF-8 text$"):
        read_text(path)
    path.write_bytes(b"a: 1\nb: \0")
    with pytest.raises(InputError, match=r"f\.yaml:2: a null byte: not a text file$"):
        read_text(path)
    path.write_bytes(b"#" * ((1 << 20) + 1))
    with pytest.raises(InputError, match=r"f\.yaml: longer than 1048576 bytes$"):
        read_yaml(path)
    path.write_bytes(b"\xef\xbb\xbfa: 1\r\nb: 2\r")
    assert read_text(path) == "a: 1\nb: 2\n"
    with pytest.raises(InputError, match=r"cannot be written: No such file or directory$"):
        write_text(tmp_path / "absent" / "f", "x")
    with pytest.raises(InputError, match=r"cannot be written: Not a directory$"):
        write_text(path / "f", "x")


def plain(value: Any) -> bool:
    """Whether `value` holds nothing but what JSON has."""
    if isinstance(value, dict):
        return all(map(plain, value)) and all(map(plain, value.values()))
    if isinstance(value, list):
        return all(map(plain, value))
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, str | int)


PIECES = st.lists(
    st.sampled_from(
        ["{", "}", "[", "]", ":", ",", '"a"', "a", "b: ", "- ", "\n", "  ", "&a", "*a", "!!int ",
         "<<: ", "NaN", "Infinity", "1e999", "-", "1", "1" * 5000, "0x1", "true", "null", ".inf",
         "2024-01-01", '"\\ud800"', "? ", "|", "#", "'", "%", "\x00", "\u2028", "1:30"]
    ),
    max_size=30,
).map("".join)  # fmt: skip


@pytest.mark.parametrize("parse", [parse_json, parse_yaml])
@settings(max_examples=300)
@given(text=st.one_of(PIECES, st.text()))
def test_whatever_is_read_is_plain(parse: Callable[[str, str], Any], text: str) -> None:
    try:
        document = parse(text, "here")
    except InputError as error:
        assert str(error).startswith("here")  # noqa: PT017
        assert "\n" not in str(error)  # noqa: PT017
    else:
        assert plain(document)
        to_json(document)


PARTS = st.sampled_from(["NaN", "Infinity", *"eE+-1.d8", "0" * 64, "\\u", "\\uD"])


@settings(max_examples=500)
@given(st.lists(PARTS | st.text(max_size=3), max_size=8).map("".join))
def test_the_screen_lets_nothing_odd_through(text: str) -> None:
    assert _may_be_odd(text) or not _ODD.search(text)


@pytest.mark.parametrize(
    ("text", "may"),
    [
        ('{"prompt_tokens": 1433, "arrival_s": 1.5e-300, "session": "a+b.c"}', False),
        ('{"text": "ende 5 \\u00e4 N a N"}', False),
        ("1" * 64, False),
        ("1" * 65, True),
        ("1e+300", True),
        ("NaN", True),
        ("-Infinity", True),
        ("\\uD83d", True),
    ],
)
def test_what_is_screened(text: str, may: bool) -> None:
    assert _may_be_odd(text) == may


@given(st.text(alphabet="ab\n\u2028\x85\x0b\r"))
def test_only_line_feeds_end_lines(text: str) -> None:
    assert list(lines(text)) == [line for line in re.split(r"(?<=\n)", text) if line]
