"""Puts servers through faults, one server at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp

from tests.live.chaos.faults import Fault, Scene
from tests.live.chaos.server import Server, StartFailed, body, send
from tests.live.chaos.table import EXACT, Row, row_of

BEFORE, DURING, AFTER = 12, 24, 12
"""Requests that should come back, around each fault."""
GAP_S = 0.06
STARTS = 3
"""Attempts to have a server that serves."""
Say = Callable[[Row], None]


async def _requests(server: Server) -> dict[str, str]:
    """What becomes of a few requests to a server that nothing has happened to."""
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(connector=connector) as session:
        return await send(session, server.url, [body(n) for n in range(BEFORE)], "first")


def _fresh(folder: Path, gimbal: Mapping[str, Any] | None) -> tuple[Server, list[str]]:
    """A server that serves, and why earlier ones did not: that is not the fault's doing.

    Raises StartFailed when none can be had.
    """
    why: list[str] = []
    for start in range(1, STARTS + 1):
        server = Server(folder, gimbal)
        failed = [said for said in asyncio.run(_requests(server)).values() if said != EXACT]
        if not failed:
            return server, why
        why = [f"servers that failed before any fault: {start} ({failed[0][:60]})"]
        server.stop()
    raise StartFailed("; ".join(why))


async def _through(server: Server, fault: Fault) -> Scene:
    """Requests before, during and after one fault."""
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(connector=connector) as session:
        scene = Scene(server, session)
        before = [body(number) for number in range(BEFORE)]
        scene.outcomes |= await send(session, server.url, before, "before")
        if fault.ends:
            await fault.act(scene)
            return scene
        during = [body(number) for number in range(DURING)]
        others = asyncio.create_task(send(session, server.url, during, "during", GAP_S))
        await asyncio.sleep(0.3)
        try:
            await fault.act(scene)
        except (OSError, LookupError, aiohttp.ClientError) as error:
            scene.troubles.append(f"{type(error).__name__}: {error}"[:150])
        scene.outcomes |= await others
        after = [body(number) for number in range(AFTER)]
        scene.outcomes |= await send(session, server.url, after, "after")
    return scene


def _judge(scene: Scene, fault: Fault) -> None:
    """What the server looks like afterwards."""
    server = scene.server
    if fault.ends:
        code, left = server.end()
        scene.remarks.append(f"exit code {code}: {server.last_line()}")
        scene.troubles += left + ([] if code else ["a server that lost a process ended with 0"])
        return
    if not server.runs:
        scene.troubles.append(f"the server ended: {server.last_line()}")
    elif not server.alone and (said := server.unsettled()):
        scene.troubles.append(f"{said} on an idle server")


def _own_server(fault: Fault, folder: Path, alone: bool) -> Scene | StartFailed:
    """One fault on a server of its own."""
    try:
        server, why = _fresh(folder, None if alone else fault.gimbal or {})
    except StartFailed as error:
        return error
    try:
        scene = asyncio.run(_through(server, fault))
        _judge(scene, fault)
    finally:
        how = server.stop()
    scene.troubles += why if fault.ends else [*why, *how]
    return scene


def _shared(faults: Sequence[Fault], folder: Path, alone: bool) -> dict[str, Scene]:
    """Faults on one server; after one that left traces, another server is started."""
    scenes: dict[str, Scene] = {}
    server: Server | None = None
    for fault in faults:
        why: list[str] = []
        if server is None:
            server, why = _fresh(folder, None if alone else {})
        scene = scenes[fault.name] = asyncio.run(_through(server, fault))
        _judge(scene, fault)
        scene.troubles += why
        if scene.troubles or not server.runs or fault is faults[-1]:
            if server.runs:
                scene.troubles += server.stop()
            server = None
    return scenes


def run(faults: Sequence[Fault], folder: Path, say: Say) -> list[Row]:
    """A row per fault, in order; `say` gets each as soon as it is known."""
    shared = [fault for fault in faults if fault.shares_a_server]
    both = [fault for fault in shared if fault.alone]
    alone = _shared(both, folder, alone=True)
    here = _shared(shared, folder, alone=False)
    rows = []
    for fault in faults:
        if not fault.shares_a_server:
            rows.append(_row_of_own(fault, folder))
        else:
            scene = here[fault.name]
            other = alone[fault.name].outcomes if fault.alone else None
            remark = "; ".join(scene.remarks)
            rows.append(row_of(fault.name, scene.outcomes, other, remark, scene.troubles))
        say(rows[-1])
    return rows


def _row_of_own(fault: Fault, folder: Path) -> Row:
    """The row of a fault that needs servers of its own."""
    found = _own_server(fault, folder, alone=False)
    if isinstance(found, StartFailed):
        # A refusal at the start, on one line, is an answer; anything else is not.
        said = str(found)
        trouble = [] if said.startswith("exit code 2: gimbal:") else ["the server did not start"]
        return row_of(fault.name, {}, None, said, trouble)
    other = None
    if fault.alone:
        vllm = _own_server(fault, folder, alone=True)
        if isinstance(vllm, StartFailed):
            found.troubles.append(f"vLLM alone did not start: {vllm}")
        else:
            other = vllm.outcomes
    return row_of(fault.name, found.outcomes, other, "; ".join(found.remarks), found.troubles)
