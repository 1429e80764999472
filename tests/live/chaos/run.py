"""Puts servers through faults, one server at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

import aiohttp

from tests.live.chaos.faults import Fault, Scene
from tests.live.chaos.server import Server, StartFailed, body, send
from tests.live.chaos.table import Row, row_of

BEFORE, DURING, AFTER = 12, 24, 12
"""Requests that should come back, around each fault."""
GAP_S = 0.06
Say = Callable[[Row], None]


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
        server = Server(folder, None if alone else fault.gimbal or {})
    except StartFailed as error:
        return error
    try:
        scene = asyncio.run(_through(server, fault))
        _judge(scene, fault)
    finally:
        how = server.stop()
    if not fault.ends:
        scene.troubles += how
    return scene


def _shared(faults: Sequence[Fault], folder: Path, alone: bool, done: Callable[..., None]) -> None:
    """Faults on one server, which is started anew when one ended it."""
    server: Server | None = None
    last: Scene | None = None
    for fault in faults:
        if server is None or not server.runs:
            server = Server(folder, None if alone else {})
        last = asyncio.run(_through(server, fault))
        _judge(last, fault)
        done(fault, last)
    if server is not None and server.runs and (how := server.stop()) and last is not None:
        last.troubles += how
        done(faults[-1], last)


def run(faults: Sequence[Fault], folder: Path, say: Say) -> list[Row]:
    """A row per fault, in order; `say` gets each as soon as it is known."""
    alone: dict[str, Scene] = {}
    here: dict[str, Scene] = {}
    shared = [fault for fault in faults if fault.shares_a_server]
    both = [fault for fault in shared if fault.alone]
    if both:
        _shared(both, folder, True, lambda fault, scene: alone.update({fault.name: scene}))
    _shared(shared, folder, False, lambda fault, scene: here.update({fault.name: scene}))
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
