"""The control message of a board: what an operator switched on a running server.

Two buffers take turns, so that a reader finds one whole whatever a writer does; the version in the
header says which is the newest. A text carries a checksum over itself and its version.
"""

from __future__ import annotations

import json
import zlib
from typing import Any

from gimbal.board.layout import (
    CONTROL_AT,
    CONTROL_BYTES,
    CONTROL_VERSION_AT,
    CONTROL_WORDS,
    RETRIES,
    WORD,
)
from gimbal.board.storage import Storage


def encoded_control(values: dict[str, Any]) -> bytes:
    """A control message as it lies on the board.

    Raises ValueError when it is too long, or holds what JSON does not know.
    """
    text = json.dumps(values, sort_keys=True, allow_nan=False).encode()
    if len(text) > CONTROL_BYTES:
        raise ValueError(f"control message of {len(text)} bytes, at most {CONTROL_BYTES}")
    return text


def decoded_control(text: bytes) -> dict[str, Any]:
    """The message in `text`; empty when it is none."""
    try:
        values = json.loads(text, parse_constant=_no_number) if text else {}
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def read_control(storage: Storage) -> tuple[int, bytes]:
    """Version and text of the newest message; no text where there is none that can be trusted.

    Raises OSError when the file is no board any more.
    """
    version = storage.control_version()
    for _ in range(RETRIES):
        if version == 0:
            break
        words = storage.read(_buffer(version), CONTROL_WORDS)
        length, check = WORD.unpack_from(words)[0], WORD.unpack_from(words, 8)[0]
        text = words[16 : 16 + min(length, CONTROL_BYTES)]
        if _checksum(text, version) == check:
            return version, text
        version = storage.control_version()
    return version, b""


def write_control(storage: Storage, version: int, text: bytes) -> None:
    """Makes `text` the message number `version`; call under `Storage.changing`."""
    head = WORD.pack(len(text)) + WORD.pack(_checksum(text, version))
    storage.write(_buffer(version), head + text)
    storage.write(CONTROL_VERSION_AT, WORD.pack(version))


def _buffer(version: int) -> int:
    return CONTROL_AT + version % 2 * CONTROL_WORDS


def _checksum(text: bytes, version: int) -> int:
    return zlib.crc32(text, version & 0xFFFFFFFF)
