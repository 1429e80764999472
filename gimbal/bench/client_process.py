"""Runs the client in a process of its own, so that nothing else delays its arrivals."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from gimbal.bench.client import Client, ClientRequest, Replay
from gimbal.core.errors import InputError
from gimbal.core.interrupts import shielded
from gimbal.workloads.prompts import PromptWriter, Vocabulary
from gimbal.workloads.trace import Trace

PROGRESS_S = 0.5


@dataclass(frozen=True)
class ReplayJob:
    """One run of one arm.

    Attributes:
        url: the server's root.
        model: the served model's name.
        trace: the requests.
        vocabulary: what prompts are made of.
        salt: see `PromptWriter`.
        prefix: request ids are ``{prefix}-{index}``.
        timeout_s: limit of one request.
        grace_s: how long open streams may go on after the last arrival.
        pin_engines: when not 0, the n-th domain of the vocabulary goes to engine n modulo this.
    """

    url: str
    model: str
    trace: Trace
    vocabulary: Vocabulary
    salt: tuple[int, ...]
    prefix: str
    timeout_s: float = 600.0
    grace_s: float = 600.0
    pin_engines: int = 0


def encode_requests(job: ReplayJob) -> list[ClientRequest]:
    """Bodies of all requests, written before the clock starts."""
    writer = PromptWriter(job.trace, job.vocabulary, job.salt)
    names = list(job.vocabulary.names)
    requests = []
    for index, request in enumerate(job.trace.requests):
        pinned = job.pin_engines and request.domain in names
        body: dict[str, Any] = {
            "model": job.model,
            "prompt": writer.prompt(index),
            "max_tokens": request.output_tokens,
            "temperature": 0.0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if request.session is not None:
            body["user"] = request.session
        encoded = json.dumps(body, separators=(",", ":")).encode()
        requests.append(
            ClientRequest(
                f"{job.prefix}-{index}",
                request.arrival_s,
                encoded,
                request.output_tokens,
                request.session,
                names.index(str(request.domain)) % job.pin_engines if pinned else None,
            )
        )
    return requests


def run_replay(job: ReplayJob, on_progress: Callable[[int, int], None] | None = None) -> Replay:
    """Replays `job` in a child process; `on_progress` gets (requests ended, streams open).

    SIGINT or SIGTERM while it runs stops the child, which hands over what it has measured; the
    KeyboardInterrupt that follows has it as ``.replay``. Raises RuntimeError with the
    child's traceback when it fails.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_child, args=(job, theirs), daemon=True)
    interrupted = threading.Event()

    def stop() -> None:
        interrupted.set()
        with contextlib.suppress(OSError):  # it has just ended by itself
            ours.send("stop")

    with _on_interrupt(stop):
        with shielded():
            process.start()
        theirs.close()
        try:
            replay = _receive(ours, on_progress)
        except RuntimeError:
            if interrupted.is_set():  # what stops a whole group stops the child as well
                raise KeyboardInterrupt from None
            raise
        finally:
            process.join(5)
            if process.is_alive():
                process.terminate()
    if interrupted.is_set():
        interrupt = KeyboardInterrupt()
        interrupt.replay = replay  # type: ignore[attr-defined]
        raise interrupt
    return replay


def _receive(pipe: Connection, on_progress: Callable[[int, int], None] | None) -> Replay:
    """Reads the child's messages up to its result."""
    while True:
        try:
            kind, value = pipe.recv()
        except (EOFError, OSError):  # the latter amid a message
            raise RuntimeError("the client process died") from None
        if kind == "error":
            raise RuntimeError(f"the client process failed:\n{value}")
        if kind == "done":
            replay: Replay = value
            return replay
        if on_progress is not None:
            on_progress(*value)


@contextlib.contextmanager
def _on_interrupt(stop: Callable[[], None]) -> Iterator[None]:
    """SIGINT and SIGTERM call `stop` instead of raising in the middle of a message."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda *_: stop()) for number in signals]
    try:
        yield
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)


def _child(job: ReplayJob, pipe: Connection) -> None:
    try:
        requests = encode_requests(job)
        # A collection during the run would stop every stream's clock at once.
        gc.collect()
        gc.freeze()
        gc.disable()
        take_precedence()
        pipe.send(("done", _loop_runner()(_replay(job, requests, pipe))))
    except Exception:
        with contextlib.suppress(OSError):
            pipe.send(("error", traceback.format_exc()))


def take_precedence() -> bool:
    """Asks for real-time scheduling, so that busy engines cannot keep the client off a core.

    A client stands for users on other machines; on few cores it would wait for the engines.
    Real-time priority takes no more than it uses. Returns False where the system does not permit
    it; every report then shows how long the client had no core.
    """
    try:
        # Threads inherit it: an ordinary one that is kept off a core while it holds the
        # interpreter lock would stop the others.
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    except (AttributeError, OSError):
        return False
    return True


def _loop_runner() -> Callable[[Any], Replay]:
    """uvloop's runner where it is installed (vLLM brings it): half the CPU time per token."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run
    runner: Callable[[Any], Replay] = uvloop.run
    return runner


async def _replay(job: ReplayJob, requests: list[ClientRequest], pipe: Connection) -> Replay:
    client = Client(job.url, job.timeout_s, job.grace_s)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def wait_for_stop() -> None:
        with contextlib.suppress(EOFError, OSError, RuntimeError):
            pipe.recv()
            loop.call_soon_threadsafe(stop.set)

    threading.Thread(target=wait_for_stop, daemon=True).start()

    async def report() -> None:
        while True:
            await asyncio.sleep(PROGRESS_S)
            pipe.send(("progress", client.progress))

    reporter = asyncio.create_task(report())
    try:
        return await client.replay(requests, stop)
    finally:
        reporter.cancel()


def check_client(
    streams: int = 500,
    tokens: int = 100,
    tick_s: float = 0.05,
    on_progress: Callable[[int, int], None] | None = None,
) -> Replay:
    """Measures the client alone: `streams` concurrent streams from the echo server."""
    from gimbal.bench.echo import EchoOptions, echo_server
    from gimbal.workloads.prompts import uniform_vocabulary
    from gimbal.workloads.trace import TraceRequest, make_trace

    if streams < 1:
        raise InputError(f"streams {streams}: expected a whole number >= 1")
    rows = [TraceRequest(i * 0.002, 300, tokens) for i in range(streams)]
    with echo_server(EchoOptions(tick_s=tick_s)) as url:
        vocabulary = uniform_vocabulary(0, 1000)
        job = ReplayJob(url, "echo", make_trace("echo", rows), vocabulary, (0,), "e")
        return run_replay(job, on_progress)
