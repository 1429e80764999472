"""Starts the planned server, shows how far it is, says when it is ready, and takes it down."""

from __future__ import annotations

import collections
import contextlib
import json
import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import IO

from rich.console import Console

from gimbal.vllm_plugin.serve import processes
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
_HIDDEN_UNTIL_READY = re.compile(r"\b(INFO|DEBUG|WARNING)\b|^$|^\[W|^Loading|Warning:|^  |Triton")
STOP_GRACE_S = 20.0


class Supervisor:
    """One server's life. `run` returns the exit code of ``gimbal serve``."""

    def __init__(self, plan: ServePlan, *, verbose: bool, console: Console) -> None:
        self.plan = plan
        self.console = console
        self.quiet_start = console.is_terminal and not verbose
        self.phase = 0
        self.ready = False
        self.tail: collections.deque[str] = collections.deque(maxlen=60)
        self.started_s = time.monotonic()
        self._stopping = False
        # Not an Event: its lock would be taken twice by a signal that comes while it is waited for.
        self._wake: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._show_phase: Callable[[str], None] = _silent

    def run(self) -> int:
        processes.adopt_orphans()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._stop)
        with tempfile.TemporaryDirectory(prefix="gimbal-") as scratch:
            environment = os.environ | self.plan.environment
            # vLLM's IPC sockets and rendezvous files, gone with the folder.
            environment |= {"TMPDIR": scratch, "PYTHONUNBUFFERED": "1"}
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
            assert child.stdout is not None
            reader = threading.Thread(target=self._relay, args=(child.stdout,), daemon=True)
            reader.start()
            try:
                with self._progress():
                    self._wait_ready(child)
                if self.ready:
                    self._announce()
                    while child.poll() is None and not self._stopped_within(0.5):
                        pass
                code = self._outcome(child)
            finally:
                processes.end_all(child.pid, STOP_GRACE_S if self.ready else 5.0)
                child.wait()
            reader.join(timeout=5.0)
        if code:
            self._explain(code)
            # vLLM's own parser ends with 2 for a flag it refuses, and so does Gimbal.
            return 2 if code == 2 and not self.ready else 1
        self._say("stopped; no process and no shared memory left")
        return 0

    def _stop(self, *_: object) -> None:
        self._stopping = True
        self._wake.put(None)

    def _stopped_within(self, seconds: float) -> bool:
        """Waits until a signal asks for a stop, at most so long; whether one has."""
        if not self._stopping:
            with contextlib.suppress(queue.Empty):
                self._wake.get(timeout=seconds)
        return self._stopping

    def _outcome(self, child: subprocess.Popen[str]) -> int:
        """0 for a stop that was asked for, else how the server ended on its own."""
        if self._stopping:
            self._say("stopping")
            return 0
        code = child.wait()
        # A server nobody has seen ready did not do its job, however politely it left.
        return code or (0 if self.ready or self.plan.headless else 1)

    def _wait_ready(self, child: subprocess.Popen[str]) -> None:
        health = self.plan.url.removesuffix("/v1") + "/health"
        while child.poll() is None and not self._stopped_within(0.25):
            if not self.plan.headless and _answers(health):
                self.ready = True
                return

    def _relay(self, stream: IO[str]) -> None:
        for line in stream:
            self.tail.append(line)
            self._advance(line)
            if self._is_shown(line):
                try:
                    self.console.out(line, end="", highlight=False)
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
        levels = ", ".join(self.plan.config.levels) or "none"
        self._say(
            f"ready in {took_s:.1f} s at {self.plan.url} "
            f"(model {self.plan.model}; levels: {levels}; {memory_gib:.1f} GiB resident)"
        )
        if self.plan.config.levels:
            self._say(f"watch it: {self.plan.url.removesuffix('/v1')}/gimbal")
        body = {
            "model": self.plan.model,
            "messages": [{"role": "user", "content": "Hello"}],
            "max_tokens": 32,
        }
        self._say(
            f"try: curl {self.plan.url}/chat/completions -H 'Content-Type: application/json' "
            f"-d '{json.dumps(body)}'"
        )

    def _explain(self, code: int) -> None:
        if self.quiet_start and not self.ready:
            self.console.out("".join(self.tail), end="", highlight=False)
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        when = "while running" if self.ready else f"while {PHASES[self.phase][1]}"
        print(f"gimbal: the server ended by itself {when} ({how})", file=sys.stderr)

    def _say(self, text: str) -> None:
        self.console.out(f"gimbal: {text}", highlight=False)


def _silent(text: str) -> None:
    del text


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2.0) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError):
        return False
