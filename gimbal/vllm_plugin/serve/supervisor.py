"""Starts the planned server, shows how far it is, says when it is ready, and takes it down."""

from __future__ import annotations

import collections
import contextlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from rich.console import Console

from gimbal.core.caches import temporary_folder
from gimbal.core.errors import InputError
from gimbal.vllm_plugin.serve import processes, shared_memory
from gimbal.vllm_plugin.serve.family import REPORTS, Ended, Family
from gimbal.vllm_plugin.serve.head import GONE_S, Head
from gimbal.vllm_plugin.serve.plan import ServePlan

# What a line of vLLM's log says about the phase of the start; the first match of a later phase
# moves on, an earlier one never moves back.
PHASES: tuple[tuple[str, str], ...] = (
    (r"", "importing vLLM"),
    (r"non-default args", "building the engine configuration"),
    (r"Initializing a V1 LLM engine|\(EngineCore", "starting the engines"),
    (r"Starting to load model|Loading safetensors|\(Worker", "loading the model"),
    (r"GPU KV cache size|KV cache size|for KV cache", "reserving KV cache"),
    (r"Starting vLLM server|Started server process", "opening the port"),
)
# What every engine logs last before it waits for requests: a headless node has no port to ask.
_ENGINE_STARTED = re.compile(r"\binit engine \(")
_HIDDEN_UNTIL_READY = re.compile(r"\b(INFO|DEBUG|WARNING)\b|^$|^\[W|^Loading|Warning:|^  |Triton")
STOP_GRACE_S = 20.0
LOST_GRACE_S = 20.0
"""A server that lost a process it cannot do without ends by itself within this time, or is ended:
not every loss is noticed by vLLM."""
STOP_TOGETHER_S = 1.0
"""A process that ends this short before a stop is asked for belongs to the stop."""


@dataclass(frozen=True, slots=True)
class _Server:
    """What was started, and what is kept track of for its end."""

    child: subprocess.Popen[str]
    family: Family
    shared: shared_memory.SharedMemory

    def end(self, grace_s: float) -> None:
        processes.end_all(self.child.pid, grace_s, self.shared.look)
        self.shared.remove()
        self.family.close()
        self.child.wait()


class Supervisor:
    """One server's life. `run` returns the exit code of ``gimbal serve``.

    0: stopped by SIGINT, SIGTERM or a hang-up. 1: the server ended by itself, or a process that
    it cannot do without did. 2: vLLM refused a flag.
    """

    def __init__(self, plan: ServePlan, *, verbose: bool, console: Console) -> None:
        self.plan = plan
        self.console = console
        self.quiet_start = console.is_terminal and not verbose
        self.phase = 0
        self.ready = False
        self.engines_started = 0
        self.tail: collections.deque[str] = collections.deque(maxlen=60)
        self.started_s = time.monotonic()
        self._head: Head | None = None
        self._lost_head = False
        self._stopping = False
        self._stop_s = self._lost_s = math.inf
        # Not an Event: its lock would be taken twice by a signal that comes while it is waited for.
        self._awake, self._wake = os.pipe()
        os.set_blocking(self._wake, False)
        self._show_phase: Callable[[str], None] = _silent

    def run(self) -> int:
        processes.adopt_orphans()
        self._listen()
        self._head = Head(self.plan.head) if self.plan.head else None
        if swept := shared_memory.sweep():
            self._say(f"removed {swept} files that a crashed server had left in /dev/shm")
        with _scratch_folder() as scratch:
            server = self._launch(scratch)
            assert server.child.stdout is not None
            reader = threading.Thread(target=self._relay, args=(server.child.stdout,), daemon=True)
            reader.start()
            try:
                with self._progress():
                    self._wait_ready(server)
                if self.ready:
                    self._announce()
                while self._goes_on(server, 0.5):
                    pass
                code, failed = self._outcome(server)
            finally:
                server.end(STOP_GRACE_S if self.ready else 5.0)
            reader.join(timeout=5.0)
        if code:
            self._explain(failed)
            return code
        self._say("stopped; no process and no shared memory left")
        return 0

    def _listen(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            # `nohup` has a hang-up ignored, here and in every child.
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._stop)

    def _launch(self, scratch: str) -> _Server:
        reports = Path(scratch) / "processes"
        environment = os.environ | self.plan.environment
        # vLLM's IPC sockets and rendezvous files, gone with the folder.
        environment |= {"TMPDIR": scratch, "PYTHONUNBUFFERED": "1", REPORTS: str(reports)}
        shared = shared_memory.SharedMemory(processes.descendants)
        child = subprocess.Popen(
            self.plan.command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            # Not a session: its autogroup would starve clients outside (docs/benchmarking.md).
            process_group=0,
            text=True,
            errors="replace",
        )
        return _Server(child, Family(child.pid, reports), shared)

    def _stop(self, *_: object) -> None:
        if not self._stopping:
            self._stopping, self._stop_s = True, time.monotonic()
        with contextlib.suppress(BlockingIOError):
            os.write(self._wake, b"\0")

    def _goes_on(self, server: _Server, seconds: float) -> bool:
        """Watches for so long, or until something happens; False once the server has to end."""
        server.family.wait(seconds, self._awake)
        server.shared.look()
        if self._stopping or server.child.poll() is not None:
            return False
        if server.family.first_failure(None) is None:
            if self._head is not None and self.ready:
                self._lost_head = self._head.is_gone(processes.descendants())
            return not self._lost_head
        self._lost_s = min(self._lost_s, time.monotonic())
        return time.monotonic() - self._lost_s < LOST_GRACE_S

    def _outcome(self, server: _Server) -> tuple[int, Ended | None]:
        """Exit code of ``gimbal serve``, and which process ended first if one did by itself."""
        if self._stopping:
            self._say("stopping")
            # systemd asks every process at once: some are gone before we have heard of it. A
            # server that was going down already has failed all the same.
            if self._stop_s < self._lost_s + STOP_TOGETHER_S:
                return 0, None
        code = server.child.poll()
        failed = server.family.first_failure(code)
        if failed is None:
            # A server that nobody asked to stop did not do its job, however politely it left.
            # Engines without API servers end politely too, when their head has gone.
            role = "headless node" if self.plan.headless else "API server"
            return 1, Ended(role, server.child.pid, code)
        # vLLM's own parser ends with 2 for a flag it refuses, and so does Gimbal.
        refused = failed.pid == server.child.pid and code == 2 and not self.ready
        return (2 if refused else 1), failed

    def _wait_ready(self, server: _Server) -> None:
        while self._goes_on(server, 0.25):
            if self._answers():
                self.ready = True
                return

    def _answers(self) -> bool:
        """Whether the server answers; another program on its port does not count.

        A headless node answers its head alone, once its engines have started.
        """
        if self.plan.headless:
            return self.engines_started >= self.plan.local_engines
        address = self.plan.address
        if address is None or not address.is_healthy():
            return False
        return address.uds is not None or processes.listens(processes.descendants(), address.port)

    def _relay(self, stream: IO[str]) -> None:
        shown = "\n"
        for line in stream:
            self.tail.append(line)
            self._advance(line)
            self.engines_started += bool(_ENGINE_STARTED.search(line))
            if self._is_shown(line):
                self._print(shown := line)
        if not shown.endswith("\n"):
            self._print("\n")  # what we say next stands on a line of its own

    def _print(self, text: str) -> None:
        try:
            self.console.out(text, end="", highlight=False)
        except OSError:
            # Whoever read our output is gone; the server must not block on its log.
            self.console = Console(file=open(os.devnull, "w"))  # noqa: SIM115

    def _is_shown(self, line: str) -> bool:
        """On a terminal, only what asks for attention while starting, and nothing of the stop."""
        if not self.quiet_start:
            return True
        if self._stopping:
            return False
        return self.ready or not _HIDDEN_UNTIL_READY.search(line[:120])

    def _advance(self, line: str) -> None:
        for number in range(len(PHASES) - 1, self.phase, -1):
            if re.search(PHASES[number][0], line):
                self.phase = number
                self._show_phase(PHASES[number][1])
                return

    @contextlib.contextmanager
    def _progress(self) -> Iterator[None]:
        """A spinner on a terminal, one plain line per phase elsewhere."""
        if self.quiet_start:
            with self.console.status(self._phase_text(PHASES[0][1])) as status:
                self._show_phase = lambda text: status.update(self._phase_text(text))
                yield
        else:
            self._show_phase = lambda text: self._say(self._phase_text(text))
            self._show_phase(PHASES[0][1])
            yield
        self._show_phase = _silent

    def _phase_text(self, text: str) -> str:
        return f"{text} ({time.monotonic() - self.started_s:.0f} s)"

    def _announce(self) -> None:
        took_s = time.monotonic() - self.started_s
        memory_gib = processes.resident_bytes(processes.descendants()) / 2**30
        idle = self.plan.idle_levels
        acting = [level for level in self.plan.config.levels if level not in idle]
        levels = ", ".join(acting) or "none"
        levels += f"; idle: {', '.join(idle)}" if idle else ""
        address = self.plan.address
        where = f"at {address.uds or address.url + '/v1'}" if address else "for its head"
        self._say(
            f"ready in {took_s:.1f} s {where} "
            f"(model {self.plan.model}; levels: {levels}; {memory_gib:.1f} GiB resident)"
        )
        if address is None:
            return
        if self.plan.page:
            self._say(f"watch it: {address.url}/gimbal")
        body = {
            "model": self.plan.model,
            "messages": [{"role": "user", "content": "Hello"}],
            "max_tokens": 32,
        }
        self._say(
            f"try: {address.curl}/v1/chat/completions -H 'Content-Type: application/json' "
            f"-d '{json.dumps(body)}'"
        )

    def _explain(self, failed: Ended | None) -> None:
        if self.quiet_start and not self.ready:
            self.console.out("".join(self.tail), end="", highlight=False)
        when = "while running" if self.ready else f"while {PHASES[self.phase][1]}"
        assert failed is not None
        how = failed.how
        if self._lost_head and self._head is not None:
            how = f"no connection to its head at {self._head.address} for {GONE_S:g} s"
        print(f"gimbal: {failed} ended {when}: {how}", file=sys.stderr)

    def _say(self, text: str) -> None:
        self.console.out(f"gimbal: {text}", highlight=False)


def _scratch_folder() -> tempfile.TemporaryDirectory[str]:
    try:
        return tempfile.TemporaryDirectory(prefix="gimbal-", dir=temporary_folder())
    except OSError as error:
        raise InputError(f"no folder for temporary files (TMPDIR): {error}") from error


def _silent(text: str) -> None:
    del text
