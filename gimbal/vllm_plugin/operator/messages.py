"""A control message as it arrives: who may send one, and how much of it is read and parsed.

Whoever reaches the port of a server without a key controls it, and so would a web page in the
browser of somebody who does: vLLM allows every origin. A message is therefore JSON by its content
type and comes from no page, or from one of this server.
"""

from __future__ import annotations

import json
import math
from typing import Any
from urllib.parse import urlsplit

from fastapi import Request
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect

from gimbal.core.files import is_unicode

MESSAGE_BYTES = 64 << 10
NESTING = 16
_DIGITS = 19  # of an integer
_PORTS = {"http": 80, "https": 443}


class RefusedError(Exception):
    """A message that is not taken: HTTP status and one line that says why."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


async def read_message(request: Request) -> Any:
    """The JSON value that `request` carries.

    Raises RefusedError: 403 for a foreign origin, 415 for another content type, 413 above
    `MESSAGE_BYTES`, 400 for what is no JSON, nested deeper than `NESTING`, or holds numbers or text
    that JSON does not know. Nothing of the message is repeated.
    """
    if not all(_same(origin, request.headers) for origin in request.headers.getlist("origin")):
        raise RefusedError(403, "control: a page of another origin may not switch this server")
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RefusedError(415, "control: the content type must be application/json")
    return parsed(await _body(request))


def parsed(body: bytes) -> Any:
    """The JSON value of `body`; raises RefusedError as `read_message`."""
    try:
        value = json.loads(body, parse_constant=_no_number, parse_float=_float, parse_int=_integer)
    except RecursionError:
        raise RefusedError(400, f"control: nested deeper than {NESTING} levels") from None
    except ValueError as error:
        # A decoding error shows what it could not decode.
        what = error if isinstance(error, json.JSONDecodeError) else "not in an encoding of Unicode"
        raise RefusedError(400, f"control: no JSON: {what}") from None
    _check(value, NESTING)
    return value


async def _body(request: Request) -> bytes:
    """The body, no more of it than is allowed."""
    too_long = RefusedError(413, f"control: a message has at most {MESSAGE_BYTES} bytes")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and (len(declared) > 9 or int(declared) > MESSAGE_BYTES):
        raise too_long
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > MESSAGE_BYTES:
                raise too_long
    except ClientDisconnect:
        raise RefusedError(400, "control: the client went away") from None
    return bytes(body)


def _same(origin: str, headers: Headers) -> bool:
    """Whether a page of `origin` came from the host that was asked."""
    try:
        page = urlsplit(origin)
        asked = urlsplit(f"//{headers.get('host', '')}")
        usual = _PORTS.get(page.scheme)
        return page.hostname is not None and (page.hostname, page.port or usual) == (
            asked.hostname,
            asked.port or usual,
        )
    except ValueError:  # no port, no address
        return False


def _no_number(text: str) -> float:
    raise RefusedError(400, f"control: {text} is no number in JSON")


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise RefusedError(400, "control: a number is too large")
    return value


def _integer(text: str) -> int:
    if len(text) > _DIGITS:
        raise RefusedError(400, f"control: an integer has more than {_DIGITS} digits")
    return int(text)


def _check(value: Any, levels: int) -> None:
    """Raises RefusedError unless `value` has at most `levels` levels and its text is Unicode."""
    if isinstance(value, str):
        if not is_unicode(value):
            raise RefusedError(400, "control: half a character (a lone surrogate)")
    elif isinstance(value, dict | list):
        if not levels:
            raise RefusedError(400, f"control: nested deeper than {NESTING} levels")
        for part in (*value, *value.values()) if isinstance(value, dict) else value:
            _check(part, levels - 1)
