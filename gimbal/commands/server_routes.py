"""What commands ask of a running server's Gimbal routes."""

from __future__ import annotations

import urllib.error
from http.client import HTTPException

from gimbal.core.errors import InputError, one_line
from gimbal.core.json_text import parse_json
from gimbal.core.web import open_url


def ask(url: str, path: str, timeout_s: float, most_bytes: int) -> bytes:
    """The answer to ``GET path`` of the server at `url`, with or without ``/v1`` at its end.

    Raises InputError, which names `url`, saying why there is none.
    """
    if not url.startswith(("http://", "https://")):
        raise InputError(f"{url}: expected a server's address, such as http://localhost:8000")
    address = url.rstrip("/").removesuffix("/v1") + path
    try:
        with open_url(address, timeout_s) as reply:
            content: bytes = reply.read(most_bytes + 1)
    except urllib.error.HTTPError as error:
        raise InputError(f"{url}: {_reason(error)}") from None
    except (OSError, ValueError, HTTPException) as error:  # ValueError: no URL
        what = one_line(getattr(error, "reason", error))
        raise InputError(f"{url}: {what}") from None
    if len(content) > most_bytes:
        raise InputError(f"{url}: an answer of more than {most_bytes} bytes")
    return content


def _reason(error: urllib.error.HTTPError) -> str:
    """Why the server does not answer, in its own words where it has any."""
    try:
        text = error.read(1 << 16).decode(errors="replace")
        return one_line(parse_json(text, "answer")["error"])
    except (OSError, ValueError, KeyError, TypeError, HTTPException):
        return (
            f"HTTP {error.code}: no Gimbal routes (VLLM_PLUGINS must name gimbal; vLLM's Rust "
            "front end has none)"
        )
