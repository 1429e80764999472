"""A server that costs almost nothing: it streams made-up tokens, so the client can be measured.

Every tick it sends one event on each open stream, as lock-step engines do, in the shape of vLLM's
completion stream. ``python -m gimbal.bench.echo --port 9000`` runs it alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from gimbal.core.interrupts import shielded

EVENT = (
    b'data: {"id":"cmpl-0123456789abcdef0123456789abcdef","object":"text_completion",'
    b'"created":1700000000,"model":"echo","choices":[{"index":0,"text":" token","logprobs":null,'
    b'"finish_reason":null,"stop_reason":null}],"usage":null}\n\n'
)
HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"transfer-encoding: chunked\r\nx-gimbal-engine: %d\r\n\r\n"
)


@dataclass(frozen=True, slots=True)
class EchoOptions:
    """How the echo server behaves.

    Attributes:
        tick_s: time between tokens of every stream.
        max_streams: streams beyond this get 503.
        fail_at_token: streams break after this many tokens; 0 never.
        engines: streams are labelled with an engine in turn.
    """

    tick_s: float = 0.05
    max_streams: int = 100000
    fail_at_token: int = 0
    engines: int = 2


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


class EchoServer:
    """Open streams and the clock that feeds them."""

    def __init__(self, options: EchoOptions) -> None:
        self.options = options
        self.streams: dict[_Connection, list[int]] = {}  # connection -> [sent, wanted]
        self.started = [0] * options.engines
        self._token = _chunk(EVENT)

    async def tick_forever(self) -> None:
        """Sends one token on every open stream per tick, at a steady rate."""
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            due += self.options.tick_s
            await asyncio.sleep(max(0.0, due - loop.time()))
            for connection, progress in list(self.streams.items()):
                self._advance(connection, progress)

    def _advance(self, connection: _Connection, progress: list[int]) -> None:
        progress[0] += 1
        write = connection.transport.write
        write(self._token)
        if progress[0] == self.options.fail_at_token:
            self.streams.pop(connection, None)
            connection.transport.abort()
        elif progress[0] >= progress[1]:
            usage = {"choices": [], "usage": {"completion_tokens": progress[1]}}
            event = b"data: " + json.dumps(usage, separators=(",", ":")).encode() + b"\n\n"
            write(_chunk(event) + _chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")
            self.streams.pop(connection, None)

    def respond(self, connection: _Connection, line: bytes, body: bytes) -> None:
        """Answers one request."""
        path = line.split(b" ")[1].split(b"?")[0]
        if path == b"/v1/completions":
            self._complete(connection, json.loads(body))
        elif path == b"/v1/models":
            model = {"id": "echo", "root": "echo", "max_model_len": 1 << 20}
            connection.reply(200, json.dumps({"data": [model]}).encode())
        elif path == b"/metrics":
            lines = [
                f'vllm:request_success_total{{engine="{i}",finished_reason="length"}} {n}.0'
                for i, n in enumerate(self.started)
            ]
            connection.reply(200, "\n".join(lines).encode() + b"\n")
        else:
            connection.reply(200, b"{}")

    def _complete(self, connection: _Connection, request: dict[str, Any]) -> None:
        if len(self.streams) >= self.options.max_streams:
            connection.reply(503, b'{"error":{"message":"queue is full"}}')
            return
        engine = sum(self.started) % self.options.engines
        self.started[engine] += 1
        connection.transport.write(HEAD % engine)
        self.streams[connection] = [0, int(request["max_tokens"])]


class _Connection(asyncio.Protocol):
    """Just enough HTTP/1.1: one request at a time, bodies by content-length."""

    transport: asyncio.Transport

    def __init__(self, server: EchoServer) -> None:
        self._server = server
        self._data = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.streams.pop(self, None)

    def data_received(self, data: bytes) -> None:
        self._data += data
        head, separator, rest = self._data.partition(b"\r\n\r\n")
        if not separator:
            return
        lines = head.split(b"\r\n")
        length = next(
            (int(v.split(b":")[1]) for v in lines if v.lower().startswith(b"content-length:")), 0
        )
        if len(rest) < length:
            return
        self._data = rest[length:]
        self._server.respond(self, lines[0], rest[:length])

    def reply(self, status: int, body: bytes) -> None:
        head = f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\n"
        self.transport.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)


async def serve(options: EchoOptions, port: int = 0, ready: Connection | None = None) -> None:
    """Runs until cancelled; sends the port it listens on to `ready`."""
    server = EchoServer(options)
    loop = asyncio.get_running_loop()
    listener = await loop.create_server(
        lambda: _Connection(server), "127.0.0.1", port, backlog=4096
    )
    if ready is not None:
        ready.send(listener.sockets[0].getsockname()[1])
    await server.tick_forever()


def _process(options: EchoOptions, ready: Connection) -> None:
    asyncio.run(serve(options, 0, ready))


@contextlib.contextmanager
def echo_server(options: EchoOptions | None = None) -> Iterator[str]:
    """An echo server in a process of its own; yields its URL."""
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_process, args=(options or EchoOptions(), send), daemon=True)
    with shielded():
        process.start()
    try:
        if not receive.poll(30):
            raise RuntimeError("the echo server did not start within 30 s")
        yield f"http://127.0.0.1:{receive.recv()}"
    finally:
        process.terminate()
        process.join(5)


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=9000)
    parser.add_argument("--tick-ms", type=float, default=50.0)
    arguments = parser.parse_args()
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve(EchoOptions(arguments.tick_ms / 1000), arguments.port))
