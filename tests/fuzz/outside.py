"""What comes over a socket or from shared memory: rows, the board's words, control messages."""

from __future__ import annotations

import asyncio
import json
import random
import struct
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from gimbal.board.control import encoded_control
from gimbal.board.file import Board
from gimbal.board.published import Source, packed, unpacked
from gimbal.board.slots import BoardReader, SlotWriter
from gimbal.board.wire import parse_row
from gimbal.core.config import parse_config
from gimbal.core.dispatch import POLICIES
from gimbal.core.errors import InputError
from gimbal.core.queue import ORDERINGS
from gimbal.core.snapshot import ROW_WIDTH
from gimbal.vllm_plugin.operator.routes import GimbalEndpoints, check_control
from tests.fuzz.values import absurd, check, count, finite, folder, json_value, mutated

HEAD, MAGIC = struct.Struct("<4sHH"), b"GBR1"
"""What stands before a row on the wire: magic, engine, row width."""
MAX_ENGINES = 256
MOST_ANSWER_BYTES = 16_384
LEVELS = ("dispatch", "queue", "placement", "feedback")
MESSAGE: dict[str, Any] = {
    "levels": [[], ["placement"], ["dispatch", "queue", "placement"], ["queue", "queue"], LEVELS],
    "policy": ["gimbal", "vllm", "llm-d", "nowhere.x:Y"],
    "policy_options": {"session_patience": [1.0], "kv": [3], "expected_output_tokens": [0, 100]},
    "queue_ordering": ["fcfs", "sjf", "hrrn", "gimbal"],
    "queue": {
        "max_wait_s": [0, 5.0],
        "pass_steps": [0, 32, 10**25],
        "pass_s": [1.0],
        "graph_steps": [0, 2],
        "overtake_factor": [2],
        "options": {"overtake_factor": [3], "backlog_factor": [0, 4]},
    },
    "reset": [True, False, "no", 0],
}


def rows(rng: random.Random) -> None:
    """Messages of the board's port: what is taken is a row of this version, of finite numbers."""
    engine = rng.choice((0, 1, MAX_ENGINES - 1, MAX_ENGINES, 65535))
    message = _spoilt(rng, HEAD.pack(MAGIC, engine, ROW_WIDTH) + _any_row(rng).tobytes())
    try:
        engine, row = parse_row(message)
    except ValueError as error:
        raise InputError(str(error)) from None
    if row is not None:
        check(0 <= engine < MAX_ENGINES, "engine", engine)
        check(row.shape == (ROW_WIDTH,) and row.dtype == np.float64, row.shape, row.dtype)
        check(np.isfinite(row).all() and (row >= 0).all(), "took a row with", row.min(), row.max())


def published_rows(rng: random.Random) -> None:
    """Messages to subscribers: the same, and of one name; signed, no changed one is taken."""
    name = rng.choice(("web:8000", "", "x" * rng.randrange(256), "a\nb", "é" * rng.randrange(100)))
    secret = rng.choice((None, b"secret", rng.randbytes(16)))
    source = Source(name, rng.choice((0, MAX_ENGINES - 1, MAX_ENGINES, 65535)))
    row, age_us = _any_row(rng), rng.choice((0.0, 1e18, -5.0))
    whole = packed(source, row, age_us, secret)
    message = _spoilt(rng, whole)
    reads = rng.choice((None, secret))
    try:
        found, taken, _ = unpacked(message, reads)
    except ValueError as error:
        raise InputError(str(error)) from None
    check(found.name.isprintable() and 0 <= found.rank < MAX_ENGINES, "source", found)
    check(np.isfinite(taken).all() and (taken >= 0).all(), "took a row with", taken.min())
    check(reads is None or message == whole, "took a changed message", message)


def _any_row(rng: random.Random) -> np.ndarray:
    """A row with some numbers that may be no row's."""
    values = np.zeros(ROW_WIDTH)
    for _ in range(rng.randrange(6)):
        at, value = rng.randrange(ROW_WIDTH), absurd(rng) if rng.random() < 0.5 else count(rng)
        values[at] = float(max(-1e308, min(value, 1e308))) if value == value else value
    return values


def _spoilt(rng: random.Random, whole: bytes) -> bytes:
    """`whole`, four times in ten changed, cut short, grown, or something else."""
    message, change = bytearray(whole), rng.random()
    if change < 0.2:
        message[rng.randrange(len(message))] ^= 1 << rng.randrange(8)
    elif change < 0.3:
        del message[rng.randrange(len(message)) :]
    elif change < 0.35:
        message += rng.randbytes(rng.randrange(1, 64))
    elif change < 0.4:
        message = bytearray(rng.randbytes(rng.choice((0, 4, 8, len(message)))))
    return bytes(message)


def board_words(rng: random.Random) -> None:
    """Words of the board overwritten at random: whole rows or none are read, and nobody fails."""
    board = Board(Path(folder().name) / "fuzz.board")
    writer, reader = SlotWriter(board, 1), BoardReader(board, 4)
    rows = np.zeros((3, ROW_WIDTH))
    for number in (1, 2):
        rows[number, : rng.randrange(1, ROW_WIDTH)] = count(rng)
        writer.publish(rows[number], 0.0)
    message = {"levels": ["queue"]}
    board.write_control(message)
    check((reader.read(0.0)[1] == rows[2]).all(), "read another row than was written")
    size = board.path.stat().st_size
    with board.path.open("r+b") as file:
        for _ in range(rng.randrange(1, 6)):
            # The first words say that this is a board, and whose.
            file.seek(rng.choice((rng.randrange(32, size), rng.randrange(32, size // 8))))
            file.write(rng.randbytes(rng.choice((1, 8, 600))))
        file.truncate(size)
    after = reader.read(0.0)
    check(after.shape == (4, ROW_WIDTH), after.shape)
    check((after[1] == rows).all(axis=1).any(), "showed a torn row")
    check(board.read_control() in ({}, message), "control message", board.read_control())
    board.path.unlink()


CONFIG = parse_config({"levels": ["dispatch", "queue", "placement"], "admin": True})


def control(rng: random.Random) -> None:
    """Messages of `POST /gimbal/control`: what is kept can be put in force, sent and shown."""
    kept: dict[str, Any] = {}
    for _ in range(rng.randrange(1, 3)):
        message = json_value(rng) if rng.random() < 0.05 else mutated(rng, MESSAGE)
        kept = check_control(message, CONFIG, kept)
    check(finite(kept), "kept a number that is not finite:", kept)
    check(len(encoded_control(kept)) < 4096, "kept too much:", kept)
    policy = kept.get("policy", "gimbal")
    POLICIES.build(policy, kept.get("policy_options"))
    section = dict(kept.get("queue", {}))
    options = section.pop("options", None)
    ORDERINGS.build(kept.get("ordering", "gimbal"), options)
    parse_config({"queue": section})


class _Engine:
    """vLLM's engine client as the routes see it."""

    vllm_config = SimpleNamespace(
        additional_config={"gimbal": {"admin": True, "levels": ["dispatch", "queue"]}},
        instance_id="fuzz",
        parallel_config=SimpleNamespace(
            data_parallel_size=2,
            data_parallel_size_local=2,
            local_engines_only=False,
            data_parallel_external_lb=False,
        ),
    )
    engine_core = object()

    async def reset_prefix_cache(self) -> bool:
        return True


@lru_cache(maxsize=1)
def _site() -> tuple[Any, asyncio.AbstractEventLoop]:
    from fastapi import FastAPI

    app, plugin, loop = FastAPI(), GimbalEndpoints(), asyncio.new_event_loop()
    plugin.attach_router(app)
    loop.run_until_complete(
        plugin.init_state(_Engine(), app.state, SimpleNamespace(api_key=[]))  # type: ignore[arg-type]
    )
    operator = app.state.gimbal_operator
    operator.board.close()
    operator.board = Board(Path(folder().name) / "site.board")
    operator.reader = BoardReader(operator.board, 2)
    return app, loop


def _ask(method: str, path: str, headers: dict[str, str], body: bytes) -> tuple[int, bytes]:
    """One request to the routes without a server: (status, body)."""
    app, loop = _site()
    answer: list[Any] = [0, b""]
    pieces: Iterator[bytes] = iter([body[i : i + 65_536] for i in range(0, len(body), 65_536)])

    async def receive() -> dict[str, Any]:
        piece = next(pieces, b"")
        return {"type": "http.request", "body": piece, "more_body": bool(piece)}

    async def send(message: dict[str, Any]) -> None:
        answer[0] = message.get("status", answer[0])
        answer[1] += message.get("body", b"")

    raw = [(b"host", b"localhost:8000"), *((k.encode(), v.encode()) for k, v in headers.items())]
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": raw,
        "scheme": "http",
        "server": ("localhost", 8000),
        "client": ("127.0.0.1", 1),
        "app": app,
    }
    loop.run_until_complete(app(scope, receive, send))
    return answer[0], answer[1]


def control_over_http(rng: random.Random) -> None:
    """Bodies and headers of any kind: answered shortly, never 500, and the status still works."""
    body = json.dumps(json_value(rng) if rng.random() < 0.3 else mutated(rng, MESSAGE)).encode()
    change = rng.random()
    if change < 0.1:
        body = rng.randbytes(rng.choice((0, 10, 1000)))
    elif change < 0.15:
        body = body[: rng.randrange(len(body) + 1)]
    elif change < 0.17:
        body = b"[" * rng.choice((50, 5_000)) + b"]" * 50
    elif change < 0.19:
        body = b'{"policy": "' + b"x" * rng.choice((5_000, 200_000)) + b'"}'
    elif change < 0.21:
        body = b'{"queue": {"pass_steps": ' + b"9" * rng.choice((25, 5_000)) + b"}}"
    kind = rng.choice(("application/json", "application/json; charset=utf-8", "text/plain", ""))
    origin = rng.choice(("", "", "http://localhost:8000", "http://evil.example", "null"))
    headers = {"content-type": kind, "origin": origin}
    headers = {name: value for name, value in headers.items() if value}
    status, answer = _ask("POST", "/gimbal/control", headers, body)
    check(status in (200, 400, 403, 413, 415, 422), "status", status, answer[:200])
    check(len(answer) <= MOST_ANSWER_BYTES, len(answer), "bytes of answer")
    check(status != 200 or "json" in kind, "took a message of type", kind or "none")
    check(status != 200 or origin in ("", "http://localhost:8000"), "took it from", origin)
    shown, page = _ask("GET", "/gimbal/status", {}, b"")
    if shown != 200:
        operator = _site()[0].state.gimbal_operator
        operator.board.write_control({})  # the next input is not to blame for it
    check(shown == 200, "status page answers", shown, page[:200])
