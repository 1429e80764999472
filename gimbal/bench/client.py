"""The open-loop streaming client: sends each request at its time, whatever the server does.

Latencies are taken as ``vllm bench serve`` takes them: from the moment the request is posted, with
one time stamp per received event that carries a token.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from gimbal.bench.endpoint import authorization
from gimbal.bench.sse import EventScanner
from gimbal.core.web import proxy_for, tls_for

REJECTED = frozenset({429, 503})
"""Status codes of a server that refuses load rather than fails."""
ENGINE_HEADER = "x-gimbal-engine"


@dataclass(frozen=True, slots=True)
class ClientRequest:
    """One request ready to send; `body` is encoded before the clock starts.

    `pinned_engine` asks vLLM for one data-parallel engine, whatever its dispatch would choose.
    """

    request_id: str
    arrival_s: float
    body: bytes
    expected_tokens: int
    session: str | None = None
    pinned_engine: int | None = None


@dataclass(slots=True)
class ClientResult:
    """What happened to one request; times are seconds since the run's start."""

    request_id: str
    sent_s: float
    status: str = "failed"  # ok | rejected | failed | aborted
    token_times_s: list[float] = field(default_factory=list)
    output_tokens: int = 0
    engine: int | None = None
    error: str | None = None
    ended_s: float = 0.0


@dataclass(frozen=True, slots=True)
class ClientUsage:
    """What the client itself cost: it shares the machine with the server it measures.

    Attributes:
        cpu_s: CPU time of the client process between the first and last event.
        cpu_wait_s: time its main thread was ready to run but had no core (Linux; else 0): what
            the load generator's own starvation adds to latencies.
        wall_s: wall time of the same.
        events: streamed token events received.
        peak_streams: most responses open at once.
        send_lag_p99_ms: how late requests left, 99th percentile.
    """

    cpu_s: float
    wall_s: float
    events: int
    peak_streams: int
    send_lag_p99_ms: float
    cpu_wait_s: float = 0.0

    @property
    def core_share(self) -> float:
        """Fraction of one core."""
        return self.cpu_s / self.wall_s if self.wall_s > 0 else 0.0

    @property
    def cpu_us_per_token(self) -> float:
        """All CPU time of the run, sending included, by streamed token."""
        return self.cpu_s * 1e6 / self.events if self.events else 0.0


@dataclass(frozen=True, slots=True)
class Replay:
    """One run: a result per request sent, in order of arrival, and the client's own cost."""

    results: list[ClientResult]
    usage: ClientUsage


class Client:
    """Replays requests against one endpoint.

    Args:
        url: the server's root, such as ``http://127.0.0.1:8000``.
        timeout_s: a request still open after this long is closed and counted as failed.
        grace_s: how long after the last arrival to wait for open streams.
    """

    def __init__(self, url: str, timeout_s: float = 600.0, grace_s: float = 600.0) -> None:
        self._endpoint = url.rstrip("/") + "/v1/completions"
        self._proxy = proxy_for(url)
        self._tls = tls_for(url)
        self._timeout_s = timeout_s
        self._grace_s = grace_s
        self._open = 0
        self._peak = 0
        self._events = 0
        self._start = 0.0
        self._finished = 0

    @property
    def progress(self) -> tuple[int, int]:
        """(requests ended, streams open)."""
        return self._finished, self._open

    async def replay(
        self, requests: Sequence[ClientRequest], stop: asyncio.Event | None = None
    ) -> Replay:
        """Sends every request at its arrival time and waits for the streams to end.

        Setting `stop` aborts what is open and returns what has been sent so far.
        """
        timeout = aiohttp.ClientTimeout(total=self._timeout_s, sock_connect=30)
        # Servers close idle connections after a few seconds; reusing one at that moment would
        # fail a request for no fault of the server. A new one costs about 0.2 ms.
        connector = aiohttp.TCPConnector(limit=0, force_close=True, ssl=self._tls or True)
        self._open = self._peak = self._events = self._finished = 0
        tasks: list[asyncio.Task[ClientResult]] = []
        async with aiohttp.ClientSession(
            timeout=timeout,
            connector=connector,
            auto_decompress=False,
            headers=authorization(),
        ) as session:
            cpu, waited = time.process_time(), _cpu_wait_s()
            self._start = time.perf_counter()
            try:
                await self._send_all(session, requests, tasks, stop)
                await _wait_all(tasks, self._grace_s, stop)
            finally:
                for task in tasks:
                    task.cancel()
                results = await asyncio.gather(*tasks)
            wall = time.perf_counter() - self._start
            cpu, waited = time.process_time() - cpu, _cpu_wait_s() - waited
        lags = sorted(r.sent_s - q.arrival_s for r, q in zip(results, requests, strict=False))
        lag = lags[int(0.99 * (len(lags) - 1))] * 1e3 if lags else 0.0
        return Replay(results, ClientUsage(cpu, wall, self._events, self._peak, lag, waited))

    async def _send_all(
        self,
        session: aiohttp.ClientSession,
        requests: Sequence[ClientRequest],
        tasks: list[asyncio.Task[ClientResult]],
        stop: asyncio.Event | None,
    ) -> None:
        for request in requests:
            delay = self._start + request.arrival_s - time.perf_counter()
            if delay > 0:
                await _sleep_or_stop(delay, stop)
            if stop is not None and stop.is_set():
                return
            tasks.append(asyncio.create_task(self._one(session, request)))

    async def _one(self, session: aiohttp.ClientSession, request: ClientRequest) -> ClientResult:
        headers = {"Content-Type": "application/json", "X-Request-Id": request.request_id}
        if request.session is not None:
            headers["X-Session-ID"] = request.session
        if request.pinned_engine is not None:
            headers["X-data-parallel-rank"] = str(request.pinned_engine)
        result = ClientResult(request.request_id, time.perf_counter() - self._start)
        self._open += 1
        self._peak = max(self._peak, self._open)
        try:
            async with session.post(
                self._endpoint, data=request.body, headers=headers, proxy=self._proxy
            ) as response:
                if response.status == 200:
                    await self._stream(response, result, request)
                else:
                    result.status = "rejected" if response.status in REJECTED else "failed"
                    text = (await response.text())[:300]
                    result.error = f"HTTP {response.status}: {text}"
        except asyncio.CancelledError:
            result.status, result.error = "aborted", "stopped before the end"
        except TimeoutError:
            result.error = f"no end after {self._timeout_s:g} s"
        except aiohttp.ClientError as error:
            result.error = f"{type(error).__name__}: {error}"
        finally:
            self._open -= 1
            self._finished += 1
            result.ended_s = time.perf_counter() - self._start
        return result

    async def _stream(
        self, response: aiohttp.ClientResponse, result: ClientResult, request: ClientRequest
    ) -> None:
        scanner = EventScanner()
        feed, times, start = scanner.feed, result.token_times_s, self._start
        read, clock = response.content.readany, time.perf_counter
        engine = response.headers.get(ENGINE_HEADER)
        result.engine = int(engine) if engine and engine.isdigit() else None
        try:
            while chunk := await read():
                count = feed(chunk)
                if count == 1:
                    times.append(clock() - start)
                elif count > 1:
                    times.extend([clock() - start] * count)
        finally:
            self._events += len(times)
            reported = scanner.output_tokens
            result.output_tokens = len(times) if reported is None else reported
        if scanner.error is not None:
            result.error = scanner.error
        elif not scanner.done:
            result.error = "the stream ended without [DONE]"
        elif result.output_tokens != request.expected_tokens:
            result.error = f"{result.output_tokens} of {request.expected_tokens} tokens"
        else:
            result.status = "ok"


def _cpu_wait_s() -> float:
    """Run-queue wait of the main thread so far."""
    try:
        return int(Path("/proc/self/schedstat").read_text().split()[1]) / 1e9
    except (OSError, ValueError, IndexError):
        return 0.0


async def _sleep_or_stop(delay_s: float, stop: asyncio.Event | None) -> None:
    if stop is None:
        await asyncio.sleep(delay_s)
        return
    try:
        await asyncio.wait_for(stop.wait(), delay_s)
    except TimeoutError:
        return


async def _wait_all(
    tasks: Sequence[asyncio.Task[ClientResult]], grace_s: float, stop: asyncio.Event | None
) -> None:
    """Until all tasks are done, `stop` is set or `grace_s` is over."""
    if not tasks:
        return
    everything = asyncio.ensure_future(asyncio.wait(tasks))
    waits: list[asyncio.Future[Any]] = [everything]
    if stop is not None:
        waits.append(asyncio.ensure_future(stop.wait()))
    try:
        await asyncio.wait(waits, timeout=grace_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
