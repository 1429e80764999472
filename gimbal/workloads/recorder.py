"""A server's own requests as a trace, written while it serves.

The server's thread hands over what is at hand: a prompt's token ids when it comes, a count of
tokens when some were generated. A thread of the recorder's own names the prompt's blocks and writes
a line per request that ended, in Gimbal's own format (`jsonl`). No text and no token is written.
A block is named by BLAKE2b over the prompt up to its end, keyed by the recording's salt, which is
written nowhere: who has the trace but not the salt cannot try out texts. Sessions are named so too.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import ParamSpec

from gimbal.core.errors import with_type
from gimbal.workloads import jsonl
from gimbal.workloads.trace import TraceRequest

logger = logging.getLogger("vllm.gimbal")

P = ParamSpec("P")

NAME_BYTES = 6
"""Of a block's name: among ten million blocks two are taken for one with a chance of 0.2."""
SESSION_BYTES = 8
BUFFER_BYTES = 1 << 16
IDLE_S = 1.0
"""What is buffered is written after so long without anything new."""
MOST_OPEN = 65_536
"""Requests that have not ended; above it the oldest are left out, whose end was missed."""
MOST_BEHIND_TOKENS = 4_000_000
"""Tokens of prompts that wait for their blocks' names, some 40 bytes each."""
AT_ONCE_TOKENS, PAUSE_S = 4096, 0.0005
"""Tokens named in a row, a third of a millisecond, and the rest after it: the server's thread waits
for the interpreter meanwhile."""
CLOSE_S = 5.0


@dataclass(slots=True)
class _Open:
    """A request that has not ended."""

    arrival_s: float
    prompt_tokens: int
    session: str | None
    output_tokens: int = 0
    blocks: list[int] = field(default_factory=list)


class TraceRecorder:
    """Records into a new file at `path`, readable by its owner alone, whose folder it makes.

    All methods but the recorder's own thread are called by one thread; none of them waits.

    Args:
        block_tokens: of the engines' KV blocks, which the trace's prefix blocks are.
        most_bytes: the file ends before it would outgrow this.
        salt: up to 64 bytes; recordings that share one can be put together.

    Attributes:
        left_out: requests that were not recorded, because recording fell behind.
        ended: nothing is recorded any more: the file is full, or could not be written. A trace with
            a hole would be replayed as a lull, so the first failure ends it.
    """

    def __init__(self, path: Path, block_tokens: int, most_bytes: int, salt: bytes) -> None:
        self.left_out = 0
        self.ended = False
        self._path, self._block_tokens, self._most_bytes = path, block_tokens, most_bytes
        self._salt = salt
        self._open: dict[str, _Open] = {}
        self._given_tokens = self._named_tokens = 0  # the first by the caller, the other in turn
        self._work: SimpleQueue[tuple[_Open, Sequence[int] | None] | None] = SimpleQueue()
        self._lines: list[bytes] = []
        self._buffered = self._written = 0
        self._file = -1
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            self._keep(jsonl.header(block_tokens))
        except OSError as error:
            self._end(f"serving goes on: {with_type(error)}")
        self._thread = threading.Thread(target=self._serve, name="gimbal-trace", daemon=True)
        self._thread.start()

    def arrived(
        self,
        request_id: str,
        arrival_s: float,
        prompt_tokens: int,
        token_ids: Sequence[int] | None,
        session: str | None,
    ) -> None:
        """A request is on its way to an engine.

        Args:
            arrival_s: on any clock; a trace starts with its first arrival.
            token_ids: the prompt, not to be changed later; None leaves its blocks without names.
        """
        if self.ended:
            self._open.clear()
            return
        if len(self._open) >= MOST_OPEN:
            del self._open[next(iter(self._open))]
            self.left_out += 1
        self._open[request_id] = request = _Open(arrival_s, prompt_tokens, session)
        if token_ids is None:
            return
        if self._given_tokens - self._named_tokens > MOST_BEHIND_TOKENS:
            del self._open[request_id]
            self.left_out += 1
            return
        self._given_tokens += len(token_ids)
        self._work.put((request, token_ids))

    def generated(self, request_id: str, tokens: int) -> None:
        """`tokens` more of its answer; unknown requests are ignored."""
        request = self._open.get(request_id)
        if request is not None:
            request.output_tokens += tokens

    def finished(self, request_ids: Iterable[str]) -> None:
        """Requests that ended, by themselves or by an abort; unknown ones are ignored.

        One that generated nothing is not recorded: it was refused, or its client went away.
        """
        for request_id in request_ids:
            request = self._open.pop(request_id, None)
            if request is not None and request.output_tokens and not self.ended:
                self._work.put((request, None))

    def close(self) -> None:
        """Writes what has ended so far; what has not is not in the trace."""
        self._work.put(None)
        self._thread.join(CLOSE_S)

    # What follows runs in the recorder's own thread.

    def _serve(self) -> None:
        while not self.ended:
            try:
                work = self._work.get(timeout=IDLE_S)
            except Empty:
                self._guarded(self._flush)
                continue
            if work is None:
                self._guarded(self._flush)
                self._end("")
                continue
            request, token_ids = work
            if token_ids is None:
                self._guarded(self._write, request)
            else:
                self._guarded(self._name, request, token_ids)
        if self._file >= 0:
            os.close(self._file)

    def _guarded(self, action: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
        try:
            action(*args, **kwargs)
        except Exception as error:  # nobody above would hear of it
            self._end(f"serving goes on: {with_type(error)}")

    def _name(self, request: _Open, token_ids: Sequence[int]) -> None:
        """Fills in the names of the prompt's whole blocks, each over all before it."""
        named = blake2b(key=self._salt, digest_size=NAME_BYTES)
        size = self._block_tokens
        whole = len(token_ids) // size * size
        at_once = max(1, AT_ONCE_TOKENS // size) * size
        for start in range(0, whole, at_once):
            if start:
                time.sleep(PAUSE_S)
            try:
                part = array("q", token_ids[start : min(start + at_once, whole)])
            except (OverflowError, TypeError):  # no token of any vocabulary
                break
            view = memoryview(part).cast("B")
            for at in range(0, len(view), size * part.itemsize):
                named.update(view[at : at + size * part.itemsize])
                request.blocks.append(int.from_bytes(named.copy().digest(), "little"))
        self._named_tokens += len(token_ids)

    def _write(self, request: _Open) -> None:
        session = request.session
        if session is not None:
            text = session.encode("utf-8", "surrogatepass")
            session = blake2b(text, key=self._salt, digest_size=SESSION_BYTES).hexdigest()
        self._keep(
            jsonl.line(
                TraceRequest(
                    round(request.arrival_s, 6),
                    request.prompt_tokens,
                    request.output_tokens,
                    session,
                    prefix_blocks=tuple(request.blocks),
                )
            )
        )

    def _keep(self, line: str) -> None:
        data = line.encode()
        if self._written + self._buffered + len(data) > self._most_bytes:
            self._flush()
            self._end(f"it has {self._written} bytes, of {self._most_bytes} that it may have")
            return
        self._lines.append(data)
        self._buffered += len(data)
        if self._buffered > BUFFER_BYTES:
            self._flush()

    def _flush(self) -> None:
        """Writes the buffered lines; a disk that takes a part of them is left with whole lines."""
        data = b"".join(self._lines)
        self._lines.clear()
        self._buffered = 0
        done = 0
        try:
            while done < len(data):
                done += os.write(self._file, data[done:])
        except OSError:
            os.ftruncate(self._file, self._written + data.rfind(b"\n", 0, done) + 1)
            raise
        self._written += done

    def _end(self, reason: str) -> None:
        """`reason` is empty where the server ends."""
        if self.ended:
            return
        self.ended = True
        left_out = f"; {self.left_out} requests left out" if self.left_out else ""
        if reason:
            logger.error("Gimbal: trace %s ends: %s%s", self._path, reason, left_out)
        elif left_out:
            logger.warning("Gimbal: trace %s: %d bytes%s", self._path, self._written, left_out)
