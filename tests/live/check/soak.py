"""Endurance: many requests, some aborted in mid-stream, while experts migrate all the time.

``python -m tests.live.check.soak`` passes when every request ends with its exact token count or
its abort, nothing hangs, the engines are empty afterwards, experts really migrated, and the
workers' resident memory is flat over the second half. It prints the figures and exits with 1
otherwise.

With ``--minutes`` it goes on for so long, with every level on unless ``--levels`` says otherwise,
and asks that the memory of every process of the server is flat (`tests.live.check.memory`).
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import aiohttp
from rich.console import Console

from tests.live.check import memory
from tests.live.check.correctness import make_demo_model
from tests.live.check.server import CheckedServer, ServerLayout

MAX_GROWTH = 0.01
"""Allowed growth of the workers' resident memory over the second half, as a share of it."""
MOVING = {"gimbal": {"placement": {"gamma": 0.0, "gate": 0.0}}}
"""Experts move for any gain: with what moving costs counted, even traffic gives no reason to."""
KV_CACHE_BYTES = 64 * 2**20
"""Per engine. The pool's pages become resident when first used: one so small that the first half
of the requests passes through all of it cannot look like a leak in the second. It must still hold
one request of the demo model's whole context (32,768 tokens, a little over 32 MiB)."""
REQUEST_LIMIT_S = 180.0
DRAIN_LIMIT_S = 30.0
SAMPLE_S = 0.5
LONG_SAMPLE_S = 2.0


@dataclass(frozen=True, slots=True)
class SoakRequest:
    """One request; `abort_after` tokens the client hangs up, unless that is None."""

    prompt: tuple[int, ...]
    output_tokens: int
    abort_after: int | None


@dataclass(frozen=True, slots=True)
class SoakResult:
    """What the table shows; memory in MiB, all workers together."""

    requests: int
    completed: int
    aborted: int
    wrong_count: int
    failed: int
    hung: int
    left_running: int
    duration_s: float
    output_tokens_per_s: float
    rearrangements: int
    moved_slots: int
    seconds_per_rearrangement: float
    eplb_worker: str
    workers_mid_mib: float
    workers_end_mib: float
    growth_share: float
    server_end_mib: float

    @property
    def ok(self) -> bool:
        trouble = self.wrong_count + self.failed + self.hung + self.left_running
        return (
            trouble == 0
            and self.completed + self.aborted == self.requests
            and self.rearrangements > 0
            and self.eplb_worker in ("none", "alive")
            and self.growth_share <= MAX_GROWTH
        )


def soak_requests(count: int, vocabulary: int, abort_share: float, seed: int) -> list[SoakRequest]:
    """Random lengths, log-uniform; a fixed share is aborted, each at a random token."""
    rng = random.Random(seed)
    low = 259 if vocabulary > 600 else 0
    aborted = set(rng.sample(range(count), round(count * abort_share)))
    out = []
    for i in range(count):
        prompt = tuple(rng.randrange(low, vocabulary) for _ in range(int(2 ** rng.uniform(1, 9))))
        tokens = int(2 ** rng.uniform(1, 6.5))
        if i in aborted:
            tokens += 8  # long enough that the client leaves in mid-stream
        out.append(SoakRequest(prompt, tokens, rng.randint(1, 4) if i in aborted else None))
    return out


def memory_growth(samples: Sequence[tuple[float, int]]) -> tuple[float, float, float]:
    """(start of second half, end, growth share) of (time_s, bytes) samples; medians of a tenth.

    Raises ValueError with fewer than 20 samples: no median would mean anything.
    """
    if len(samples) < 20:
        raise ValueError(f"memory growth needs 20 samples, got {len(samples)}")
    second = [value for _, value in samples[len(samples) // 2 :]]
    tenth = max(1, len(second) // 5)
    first, last = sorted(second[:tenth])[tenth // 2], sorted(second[-tenth:])[tenth // 2]
    return float(first), float(last), (last - first) / first


@dataclass
class Soak:
    """One soak of one server."""

    server: CheckedServer
    requests: list[SoakRequest]
    concurrency: int
    outcomes: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    memory: list[tuple[float, int]] = field(default_factory=list)
    processes: dict[str, list[tuple[float, int]]] = field(default_factory=dict)
    first_error: str = ""
    minutes: float | None = None

    def _queue(self, began: float) -> Iterator[SoakRequest]:
        """The requests, once, or again and again for `minutes`."""
        if self.minutes is None:
            yield from self.requests
            return
        for request in itertools.cycle(self.requests):
            if time.monotonic() - began > 60 * self.minutes or not self.server.runs:
                return
            yield request

    async def run(self) -> float:
        """Sends everything, `concurrency` at a time; returns the seconds it took."""
        began = time.monotonic()
        queue = self._queue(began)
        # A connection of its own per request: one kept alive may be closed by the server in the
        # instant it is used again, which would look like a lost request.
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        async with aiohttp.ClientSession(connector=connector) as session:
            sampler = asyncio.create_task(self._sample_memory())

            async def client() -> None:
                for request in queue:
                    await self._one(session, request)

            await asyncio.gather(*(client() for _ in range(self.concurrency)))
            sampler.cancel()
        return time.monotonic() - began

    async def _sample_memory(self) -> None:
        while True:
            workers, _ = await asyncio.to_thread(self.server.resident_bytes)
            self.memory.append((time.monotonic(), workers))
            if self.minutes is not None:
                pids = await asyncio.to_thread(self.server.processes)
                for name, value in memory.sample(pids).items():
                    self.processes.setdefault(name, []).append((time.monotonic(), value))
            await asyncio.sleep(SAMPLE_S if self.minutes is None else LONG_SAMPLE_S)

    async def _one(self, session: aiohttp.ClientSession, request: SoakRequest) -> None:
        try:
            async with asyncio.timeout(REQUEST_LIMIT_S):
                outcome = await self._stream(session, request)
        except TimeoutError:
            outcome = "hung"
        except (aiohttp.ClientError, RuntimeError, ValueError, KeyError) as error:
            outcome = "failed"
            self.first_error = self.first_error or repr(error)
        self.outcomes[outcome] += 1

    async def _stream(self, session: aiohttp.ClientSession, request: SoakRequest) -> str:
        body = {
            "model": "m",
            "prompt": list(request.prompt),
            "max_tokens": request.output_tokens,
            "ignore_eos": True,
            "temperature": 1.0,
            "stream": True,
            "return_token_ids": True,
            "stream_options": {"include_usage": True},
        }
        seen, usage = 0, -1
        async with session.post(f"{self.server.url}/v1/completions", json=body) as reply:
            if reply.status != 200:
                raise RuntimeError(f"HTTP {reply.status}: {(await reply.text())[:200]}")
            async for line in reply.content:
                if not line.startswith(b"data: {"):
                    continue
                chunk: dict[str, Any] = json.loads(line[6:])
                if "error" in chunk:
                    raise RuntimeError(str(chunk["error"])[:200])
                for choice in chunk["choices"]:
                    seen += len(choice.get("token_ids") or ())
                if chunk.get("usage"):
                    usage = int(chunk["usage"]["completion_tokens"])
                if request.abort_after is not None and seen >= request.abort_after:
                    self.tokens += seen
                    return "aborted"
        self.tokens += seen
        return "completed" if seen == usage == request.output_tokens else "wrong_count"


def wait_until_empty(server: CheckedServer) -> int:
    """Requests still running or waiting in the engines after at most `DRAIN_LIMIT_S`."""
    began = time.monotonic()
    while True:
        left = server.metric("vllm:num_requests_running") + server.metric(
            "vllm:num_requests_waiting"
        )
        if left == 0 or time.monotonic() - began > DRAIN_LIMIT_S:
            return int(left)
        time.sleep(0.5)


def soak(
    server: CheckedServer,
    requests: list[SoakRequest],
    concurrency: int,
    minutes: float | None = None,
) -> tuple[SoakResult, list[memory.ProcessMemory]]:
    """Runs `requests` against a ready server; every process's memory where `minutes` are given."""
    before = server.migrations()
    run = Soak(server, requests, concurrency, minutes=minutes)
    duration_s = asyncio.run(run.run())
    if not server.runs:
        raise RuntimeError(f"the server ended after {duration_s:.0f} s:\n{server.log_end()}")
    left = wait_until_empty(server)
    after = server.migrations()
    moved = after["rearrangements"] - before["rearrangements"]
    first, last, growth = memory_growth(run.memory)
    if run.first_error:
        print(f"first failure: {run.first_error}")
    result = SoakResult(
        requests=len(requests) if minutes is None else run.outcomes.total(),
        completed=run.outcomes["completed"],
        aborted=run.outcomes["aborted"],
        wrong_count=run.outcomes["wrong_count"],
        failed=run.outcomes["failed"],
        hung=run.outcomes["hung"],
        left_running=left,
        duration_s=round(duration_s, 1),
        output_tokens_per_s=round(run.tokens / duration_s, 1),
        rearrangements=moved,
        moved_slots=after["slots"] - before["slots"],
        seconds_per_rearrangement=round(duration_s / max(1, moved), 2),
        eplb_worker=after["worker"],
        workers_mid_mib=round(first / 2**20, 1),
        workers_end_mib=round(last / 2**20, 1),
        growth_share=round(growth, 5),
        server_end_mib=round(server.resident_bytes()[1] / 2**20, 1),
    )
    return result, memory.judge_all(run.processes, run.memory[-1][0])


def passed(result: SoakResult, processes: Sequence[memory.ProcessMemory] | None) -> bool:
    """The verdict; where every process was watched, that replaces the growth of the workers."""
    if processes is None:
        return result.ok
    if not processes or not all(row.flat for row in processes):
        return False
    return replace(result, growth_share=0.0).ok


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="a soak of an expert-parallel server")
    parser.add_argument("--model", type=Path, help="model folder (default: a fresh demo model)")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--abort-share", type=float, default=0.1)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--tp", type=int, default=1, help="tensor parallel size (default 1)")
    parser.add_argument("--redundant", type=int, default=4, help="redundant experts")
    parser.add_argument("--sync", action="store_true", help="synchronous instead of async EPLB")
    parser.add_argument("--step-interval", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, help="go on for so long, see above")
    parser.add_argument("--levels", help="Gimbal's levels (default: none, all with --minutes)")
    parser.add_argument("--plain-vllm", action="store_true", help="start vLLM itself")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args(arguments)
    folder = Path(tempfile.mkdtemp(prefix="gimbal-soak-"))
    model = options.model or make_demo_model(folder)
    vocabulary = int(json.loads((model / "config.json").read_text())["vocab_size"])
    requests = soak_requests(options.requests, vocabulary, options.abort_share, options.seed)
    layout = ServerLayout(
        2, options.tp, True, options.redundant, not options.sync, options.step_interval
    )
    extra = ("--kv-cache-memory-bytes", str(KV_CACHE_BYTES))
    levels = options.levels or ("none" if options.minutes is None else "all")
    if levels != "none" and not options.plain_vllm:
        extra += ("--additional-config", json.dumps(MOVING))
    log = folder / "server.log"
    with CheckedServer(model, layout, log, extra, options.plain_vllm, levels) as server:
        print(f"{layout.name}: ready after {server.start_s:.0f} s, log {server.log}", flush=True)
        result, processes = soak(server, requests, options.concurrency, options.minutes)
    for name, value in asdict(result).items():
        print(f"{name:<28}{value}")
    if options.minutes is not None:
        Console(width=120).print(memory.render(processes))
    ok = passed(result, processes if options.minutes is not None else None)
    print("ok" if ok else "FAILED")
    if options.json:
        written = asdict(result) | {"processes": [asdict(row) for row in processes]}
        options.json.write_text(json.dumps(written, indent=1))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
