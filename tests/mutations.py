"""Files gone wrong: bytes of a good one changed, and what a reader may do with them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from gimbal.core.errors import MOST_CHARACTERS, InputError

EXAMPLES = settings(
    max_examples=100,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
PIECES = [
    b"nan", b"NaN", b"inf", b"Infinity", b"-1", b"1e400", b"1e-400", b"1" * 60, b"9" * 4400, b"0",
    b"[", b"]" * 3, b"[" * 3000, b"{", b"}", b'"', b",", b"\n", b"\r\n", b"\0", b"\xff", b"null",
    b"true", b"\\ud800", b"\xe2\x80\xa8", b'"' + b"x" * 140_000 + b'"', b"1_0", b"0x10", b"2e18",
    b"PK\x03\x04", b"\x93NUMPY", b"\x80\x02", b"c", b".", b"r\xff\xff\xff\xff",
]  # fmt: skip


@st.composite
def mutated(draw: st.DrawFn, good: bytes) -> bytes:
    """`good` with up to four changes."""
    content = bytearray(good)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(content)))
        until = min(len(content), at + draw(st.integers(0, 12)))
        match draw(st.sampled_from(["byte", "piece", "cut", "double", "end"])):
            case "byte":
                content[at:until] = draw(st.binary(max_size=8))
            case "piece":
                content[at:until] = draw(st.sampled_from(PIECES))
            case "cut":
                del content[at:until]
            case "double":
                content[at:at] = content[at:until]
            case "end":
                del content[at:]
    return bytes(content)


def read_or_refuse(read: Callable[[Path], Any], path: Path, content: bytes) -> Any:
    """What `read` returns, None when it raises InputError; any other exception fails the test."""
    path.write_bytes(content)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy's, about headers of Python 2
            return read(path)
    except InputError as error:
        assert path.parent.name in str(error)  # noqa: PT017
        assert "\n" not in str(error)  # noqa: PT017
        assert len(str(error)) <= MOST_CHARACTERS + 3  # noqa: PT017
        return None
