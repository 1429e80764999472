"""The faults. Each is brought about while other requests are served."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import shutil
import signal
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import aiohttp

from tests.live.chaos.server import SHARED_MEMORY, Server, body, send

MIB = 2**20
SPARED_BYTES = 64 * MIB
MOST_FILL_BYTES = 4096 * MIB


@dataclass
class Scene:
    """What a fault acts on and what it reports.

    Attributes:
        outcomes: of requests the fault itself sends and that should come back.
        remarks, troubles: as in `table.Row`.
    """

    server: Server
    session: aiohttp.ClientSession
    outcomes: dict[str, str] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    troubles: list[str] = field(default_factory=list)

    @property
    def url(self) -> str:
        return self.server.url


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault.

    Attributes:
        act: brings it about.
        alone: whether vLLM alone is put through it as well.
        ends: whether the server is to end, with an exit code that is not 0.
        gimbal: keys of Gimbal's configuration that need a server of their own.
    """

    name: str
    act: Callable[[Scene], Awaitable[None]]
    alone: bool = False
    ends: bool = False
    gimbal: dict[str, str] | None = None

    @property
    def shares_a_server(self) -> bool:
        return not self.ends and self.gimbal is None


async def _leave(scene: Scene, number: int, after_bytes: int) -> None:
    """A client that hangs up: before the first byte of the answer, or in mid-stream."""
    values = body(number, 200, stream=True)
    with contextlib.suppress(aiohttp.ClientError, TimeoutError):
        async with asyncio.timeout(5.0 if after_bytes else 0.01 * (number % 8)):
            async with scene.session.post(f"{scene.url}/v1/completions", json=values) as reply:
                await reply.content.readexactly(max(1, after_bytes))


async def drop_streams(scene: Scene) -> None:
    await asyncio.gather(*(_leave(scene, number, 200) for number in range(40)))
    scene.remarks.append("40 streams dropped")


async def abort_early(scene: Scene) -> None:
    await asyncio.gather(*(_leave(scene, number, 0) for number in range(60)))
    scene.remarks.append("60 requests left before the first token")


async def duplicate_ids(scene: Scene) -> None:
    bodies = [body(number) for number in range(12)]
    headers = {"X-Request-Id": "the-same"}
    scene.outcomes |= await send(scene.session, scene.url, bodies, "same id", headers=headers)


async def lone_surrogates(scene: Scene) -> None:
    bodies = [body(number, user=f"half an emoji \ud83d {number % 3}") for number in range(12)]
    scene.outcomes |= await send(scene.session, scene.url, bodies, "surrogate")


async def long_sessions(scene: Scene) -> None:
    api = scene.server.api_server()
    before = scene.server.resident_mib(api)
    for first in range(0, 200, 8):
        bodies = [body(n, user=f"{n} " + "x" * MIB) for n in range(first, first + 8)]
        outcomes = await send(scene.session, scene.url, bodies, f"long name {first}")
        scene.outcomes |= outcomes
    grown = scene.server.resident_mib(api) - before
    scene.remarks.append(f"API server {grown:+.0f} MiB")
    if not scene.server.alone and grown > 150:
        scene.troubles.append(f"200 names of 1 MiB took {grown:.0f} MiB")


async def frozen_engine(scene: Scene) -> None:
    pid = scene.server.pid_of("EngineCore_DP1")
    os.kill(pid, signal.SIGSTOP)
    try:
        await asyncio.sleep(3.0)
    finally:
        os.kill(pid, signal.SIGCONT)


async def _control(scene: Scene, number: int, answers: Counter[int]) -> int:
    """One message that nobody should take; the length of what came back."""
    rng = random.Random(number)
    kind = "application/json"
    data = [
        rng.randbytes(200),
        b'{"policy": "' + b"x" * MIB + b'"}',
        b"[" * 20_000,
        b'{"levels": []}',  # well-formed, but as a page in a browser may send it
        b'{"queue": {"max_wait_s": Infinity}}',
        b'{"reset": "no"}',
        b'{"queue": {"pass_steps": ' + b"9" * 25 + b"}}",
    ][number % 7]
    if number % 7 == 3:
        kind = "text/plain"
    headers = {"Content-Type": kind}
    url = f"{scene.url}/gimbal/control"
    async with scene.session.post(url, data=data, headers=headers) as reply:
        answers[reply.status] += 1
        return len(await reply.read())


async def control_flood(scene: Scene) -> None:
    answers: Counter[int] = Counter()
    limit = asyncio.Semaphore(16)

    async def one(number: int) -> int:
        async with limit:
            try:
                return await _control(scene, number, answers)
            except aiohttp.ClientError:
                answers[0] += 1
                return 0

    longest = max(await asyncio.gather(*(one(number) for number in range(500))))
    said = ", ".join(f"{n} x {status or 'closed'}" for status, n in sorted(answers.items()))
    scene.remarks.append(f"500 messages: {said}; longest answer {longest:,} bytes")
    wrong = sum(n for status, n in answers.items() if status == 200 or status >= 500)
    if wrong:
        scene.troubles.append(f"{wrong} of 500 bad control messages taken or answered 5xx")
    if longest > 16_384:
        scene.troubles.append("control echoes long messages")
    # Whatever was taken must not act on the faults that follow.
    levels = json.dumps({"levels": ["dispatch", "queue", "placement", "feedback"], "queue": {}})
    headers = {"Content-Type": "application/json"}
    async with scene.session.post(f"{scene.url}/gimbal/control", data=levels, headers=headers):
        pass


async def status_flood(scene: Scene) -> None:
    answers: Counter[int] = Counter()

    async def reader(number: int) -> None:
        for _ in range(25):
            path = "/gimbal" if number % 4 == 0 else "/gimbal/status"
            async with scene.session.get(f"{scene.url}{path}") as reply:
                answers[reply.status] += 1
                await reply.read()

    await asyncio.gather(*(reader(number) for number in range(20)))
    scene.remarks.append(f"500 readings, {answers[200]} answered 200")
    if answers[200] != 500:
        scene.troubles.append(f"status answered {dict(answers)}")


async def board_deleted(scene: Scene) -> None:
    board = scene.server.board()
    board.unlink()
    await asyncio.sleep(1.5)
    if not board.exists():
        scene.troubles.append("no new board")


async def board_truncated(scene: Scene) -> None:
    os.truncate(scene.server.board(), 0)
    await asyncio.sleep(1.5)


async def board_replaced(scene: Scene) -> None:
    board = scene.server.board()
    short = board.with_suffix(".short")
    short.write_bytes(b"not a board")
    os.replace(short, board)
    await asyncio.sleep(1.5)


async def board_symlink(scene: Scene) -> None:
    board = scene.server.board()
    victim = scene.server.log.with_suffix(".victim")
    content = bytes(board.stat().st_size)
    victim.write_bytes(content)
    link = board.with_suffix(".link")
    link.symlink_to(victim)
    os.replace(link, board)
    await asyncio.sleep(1.5)
    if victim.read_bytes() != content:
        scene.troubles.append("wrote through a symbolic link")
    if board.is_symlink():
        scene.remarks.append("the link is still there")
        board.unlink()
        await asyncio.sleep(1.2)


async def memory_full(scene: Scene) -> None:
    """Fills /dev/shm but for what others may need; deletes the board, which is to be made anew."""
    free = shutil.disk_usage(SHARED_MEMORY).free
    if not 2 * SPARED_BYTES < free < MOST_FILL_BYTES:
        scene.remarks.append(f"left out: {free / MIB:.0f} MiB free in /dev/shm")
        return
    filler = SHARED_MEMORY / f"chaos-{os.getpid()}.fill"
    board = scene.server.board()
    try:
        with filler.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, free - SPARED_BYTES)
        board.unlink()
        await asyncio.sleep(1.5)
    finally:
        filler.unlink(missing_ok=True)
    scene.remarks.append(f"{(free - SPARED_BYTES) / MIB:.0f} MiB filled, 64 left")


async def nothing(scene: Scene) -> None:
    """The fault is in the server's configuration."""


async def _kill(scene: Scene, pid: int) -> None:
    """Kills `pid` while requests run that cannot end by themselves so soon."""
    bodies = [body(number, 4000) for number in range(12)]
    running = asyncio.create_task(send(scene.session, scene.url, bodies, "running"))
    await asyncio.sleep(1.0)
    scene.server.look()
    os.kill(pid, signal.SIGKILL)
    scene.outcomes |= await running


async def engine_killed(scene: Scene) -> None:
    await _kill(scene, scene.server.pid_of("EngineCore_DP1"))


async def worker_killed(scene: Scene) -> None:
    await _kill(scene, scene.server.pid_of("Worker_DP0"))


async def api_killed(scene: Scene) -> None:
    await _kill(scene, scene.server.api_server())


def faults(not_a_folder: str) -> list[Fault]:
    """All of them, those that leave the server healthy first.

    Args:
        not_a_folder: a file, given as the directory of records.
    """
    records = {"step_records": not_a_folder, "placement": {"records": not_a_folder}}
    return [
        Fault("clients drop streams", drop_streams, alone=True),
        Fault("aborts before the first token", abort_early, alone=True),
        Fault("one X-Request-Id at once", duplicate_ids, alone=True),
        Fault("lone surrogate in user", lone_surrogates, alone=True),
        Fault("200 session names of 1 MiB", long_sessions),
        Fault("engine frozen for 3 s", frozen_engine, alone=True),
        Fault("control flood", control_flood),
        Fault("status flood", status_flood),
        Fault("board deleted", board_deleted),
        Fault("board replaced by a short file", board_replaced),
        Fault("board replaced by a symbolic link", board_symlink),
        Fault("/dev/shm nearly full", memory_full),
        Fault("board truncated", board_truncated),
        Fault("records cannot be written", nothing, gimbal=records),  # type: ignore[arg-type]
        Fault("engine killed", engine_killed, alone=True, ends=True),
        Fault("worker killed", worker_killed, alone=True, ends=True),
        Fault("API server killed", api_killed, alone=True, ends=True),
    ]
