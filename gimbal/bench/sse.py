"""Counts tokens in a stream of server-sent events by scanning bytes: no JSON per token.

A JSON string never holds a raw newline or an unescaped quote, so ``\\ndata: {`` at the start of a
line and ``"choices":[]`` can only be structure, whatever text the model writes.
"""

from __future__ import annotations

import re

EVENT = b"\ndata: {"
NO_CHOICES = b'"choices":[]'
ERROR = b'\ndata: {"error"'
DONE = b"\ndata: [DONE]"
_COMPLETION_TOKENS = re.compile(rb'"completion_tokens":\s*(\d+)')


class EventScanner:
    """Reads the chunks of one response in order.

    Attributes:
        output_tokens: what the server's usage report said, or None so far.
        done: the stream ended as it should.
        error: the first bytes of an error event, or None.
    """

    __slots__ = ("_tail", "done", "error", "output_tokens")

    def __init__(self) -> None:
        self._tail = b"\n"
        self.output_tokens: int | None = None
        self.done = False
        self.error: str | None = None

    def feed(self, chunk: bytes) -> int:
        """Takes the next bytes; returns how many complete token events they ended."""
        data = self._tail + chunk
        end = data.rfind(b"\n\n")
        if end < 0:
            self._tail = data
            return 0
        # One newline of the separator stays: it begins the next event's line.
        self._tail = data[end + 1 :]
        count = data.count(EVENT, 0, end)
        if data.find(b'"completion_tokens"', 0, end) >= 0:
            for match in _COMPLETION_TOKENS.finditer(data, 0, end):
                self.output_tokens = int(match.group(1))
            count -= data.count(NO_CHOICES, 0, end)
        if data.find(ERROR, 0, end) >= 0:
            start = data.find(ERROR)
            self.error = data[start + 7 : start + 307].decode(errors="replace").split("\n")[0]
            count -= 1
        if data.find(DONE, 0, end) >= 0:
            self.done = True
        return count
