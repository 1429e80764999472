"""A demo server that may come to harm, its processes, and requests to it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp

from gimbal.bench.servers import free_port
from tests.left_over import gone, is_running
from tests.live.chaos.table import EXACT

READY_LIMIT_S = 180.0
END_LIMIT_S = 60.0
REQUEST_LIMIT_S = 60.0
SETTLE_S = 3.0
TOKENS = 8
MODEL = "gimbal-demo"
SHARED_MEMORY = Path("/dev/shm")


class StartFailed(Exception):
    """The server ended or did not become ready; the message is the last it said."""


def shared_files() -> set[str]:
    """Names in /dev/shm."""
    return {path.name for path in SHARED_MEMORY.iterdir()}


class Server:
    """One ``gimbal serve --demo``, from its start to its end.

    Args:
        folder: of its log.
        gimbal: keys of its Gimbal configuration; None for vLLM alone (``--levels none``).
    """

    def __init__(self, folder: Path, gimbal: Mapping[str, Any] | None) -> None:
        self.alone = gimbal is None
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.log = folder / f"server-{port}.log"
        self.shared_before = shared_files()
        command = [sys.executable, "-m", "gimbal.cli", "serve", "--demo", "--port", str(port)]
        if gimbal is None:
            command += ["--levels", "none"]
        else:
            section = {"gimbal": {"admin": True, **gimbal}}
            command += ["--additional-config", json.dumps(section)]
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT
            )
        self.family: list[int] = [self.process.pid]
        try:
            self._wait_ready()
        except BaseException:
            self.stop()
            raise

    def _wait_ready(self) -> None:
        deadline_s = time.monotonic() + READY_LIMIT_S
        while "gimbal: ready in" not in self._text():
            if self.process.poll() is not None:
                raise StartFailed(f"exit code {self.process.returncode}: {self.last_line()}")
            if time.monotonic() > deadline_s:
                raise StartFailed(f"not ready after {READY_LIMIT_S:g} s: {self.last_line()}")
            time.sleep(0.25)
        self.look()

    def look(self) -> list[int]:
        """Notes the processes that run now; returns all that ever did."""
        from gimbal.vllm_plugin.serve.processes import descendants_of

        found = {*self.family, *descendants_of(self.process.pid)}
        self.family = sorted(found)
        return self.family

    def _text(self) -> str:
        return self.log.read_text(errors="replace")

    def last_line(self) -> str:
        """The last thing that Gimbal itself said."""
        lines = [line for line in self._text().splitlines() if line.startswith("gimbal:")]
        return lines[-1][:200] if lines else "nothing said"

    def pid_of(self, title: str) -> int:
        """The live process whose command line contains `title`."""
        for pid in self.look():
            try:
                line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            if title in line and pid != self.process.pid and is_running(pid):
                return pid
        raise LookupError(f"no process {title!r}")

    def api_server(self) -> int:
        """The child that `gimbal serve` started and watches."""
        for pid in self.look():
            try:
                parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
                line = Path(f"/proc/{pid}/cmdline").read_bytes()
            except OSError:
                continue
            if parent == self.process.pid and b"serve.server" in line:
                return pid
        raise LookupError("no API server")

    @property
    def runs(self) -> bool:
        return self.process.poll() is None

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"{self.url}{path}", timeout=10) as reply:
            return json.load(reply)

    def board(self) -> Path:
        """The board's file."""
        return Path(self.get("/gimbal/status")["board"]["path"])

    def unsettled(self) -> str:
        """What the accounts still hold after at most `SETTLE_S`; empty when they are at zero."""
        deadline_s = time.monotonic() + SETTLE_S
        while True:
            try:
                engines = self.get("/gimbal/status")["engines"]
                names = ("unacknowledged_requests", "unacknowledged_tokens", "inflight_requests")
                left = {n: sum(e.get(n) or 0 for e in engines) for n in names}
                said = ", ".join(f"{n} {v:g}" for n, v in left.items() if v)
            except (OSError, ValueError, KeyError) as error:
                said = f"/gimbal/status: {error}"
            if not said or time.monotonic() > deadline_s:
                return said
            time.sleep(0.25)

    def resident_mib(self, pid: int) -> float:
        import psutil

        return float(psutil.Process(pid).memory_info().rss) / 2**20

    def end(self) -> tuple[int, list[str]]:
        """Waits for a server that is about to end: (exit code, what it left behind)."""
        try:
            code = self.process.wait(END_LIMIT_S)
        except subprocess.TimeoutExpired:
            self.stop()
            return 0, [f"still there {END_LIMIT_S:g} s later"]
        return code, self.left_over()

    def left_over(self) -> list[str]:
        """Processes and files in shared memory that outlived the server."""
        left = [] if gone(self.family, 5.0) else ["processes outlived it"]
        files = sorted(shared_files() - self.shared_before)
        return left + ([f"left in /dev/shm: {', '.join(files)}"] if files else [])

    def stop(self) -> list[str]:
        """Stops it; returns what is wrong with how it went."""
        if not self.runs:
            return [f"ended by itself, exit code {self.process.returncode}: {self.last_line()}"]
        self.look()
        self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(END_LIMIT_S)
        except subprocess.TimeoutExpired:
            for pid in [pid for pid in reversed(self.family) if is_running(pid)]:
                os.kill(pid, signal.SIGKILL)
            self.process.wait(10)
            return ["did not stop"]
        return self.left_over() + ([f"exit code {code} after SIGTERM"] if code else [])


def body(number: int, tokens: int = TOKENS, **more: Any) -> dict[str, Any]:
    """A completion of exactly `tokens` tokens; every fourth prompt is longer."""
    prompt = f"{number} " + "word " * (60 if number % 4 == 0 else 5)
    limits = {"max_tokens": tokens, "ignore_eos": True, "temperature": 0}
    return {"model": MODEL, "prompt": prompt, **limits, **more}


async def complete(
    session: aiohttp.ClientSession,
    url: str,
    values: Mapping[str, Any],
    headers: Mapping[str, str] | None = None,
) -> str:
    """`EXACT`, or why the completion is not what was asked for."""
    try:
        async with asyncio.timeout(REQUEST_LIMIT_S):
            async with session.post(
                f"{url}/v1/completions",
                data=json.dumps(values).encode(),
                headers={"Content-Type": "application/json", **(headers or {})},
            ) as reply:
                if reply.status != 200:
                    return f"HTTP {reply.status}: {(await reply.text())[:120]}"
                answer = await reply.json()
    except TimeoutError:
        return f"no answer in {REQUEST_LIMIT_S:g} s"
    except (aiohttp.ClientError, ValueError) as error:
        return f"{type(error).__name__}"
    got = answer["usage"]["completion_tokens"]
    finished = answer["choices"][0]["finish_reason"]
    if got == values["max_tokens"] and finished == "length":
        return EXACT
    return f"{got} tokens of {values['max_tokens']}, {finished}"


async def send(
    session: aiohttp.ClientSession,
    url: str,
    bodies: Sequence[Mapping[str, Any]],
    name: str,
    gap_s: float = 0.0,
    headers: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Sends all, one every `gap_s` seconds; outcomes by name and number."""
    tasks = []
    for values in bodies:
        tasks.append(asyncio.create_task(complete(session, url, values, headers)))
        if gap_s:
            await asyncio.sleep(gap_s)
    outcomes = await asyncio.gather(*tasks)
    return {f"{name} {number}": outcome for number, outcome in enumerate(outcomes)}
