"""Starts, keeps and stops the servers that arms run on."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from gimbal.bench.arms import ServerSpec
from gimbal.bench.endpoint import Endpoint
from gimbal.core.interrupts import deferred

START_LIMIT_S = 600.0
STOP_LIMIT_S = 60.0
SERVE = (sys.executable, "-m", "gimbal.cli", "serve")


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass
class Server:
    """One server process that this benchmark started."""

    spec: ServerSpec
    endpoint: Endpoint
    process: subprocess.Popen[bytes]
    log: Path
    log_file: IO[bytes]
    start_s: float = 0.0
    arm: str | None = None  # what it is switched to

    def wait_ready(self) -> None:
        """Until ``/health`` answers; raises RuntimeError with the end of the log otherwise."""
        began = time.monotonic()
        while not self.endpoint.healthy():
            if self.process.poll() is not None:
                code = self.process.returncode
                raise RuntimeError(f"the server ended with code {code}:\n{self.log_end()}")
            if time.monotonic() - began > START_LIMIT_S:
                raise RuntimeError(
                    f"the server was not ready after {START_LIMIT_S:g} s:\n{self.log_end()}"
                )
            time.sleep(0.5)
        self.start_s = time.monotonic() - began

    def log_end(self, lines: int = 15) -> str:
        """The last lines it printed."""
        text = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join([*text[-lines:], f"(whole log: {self.log})"])

    def stop(self) -> None:
        """SIGTERM, then SIGKILL to what is left of its process group."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_LIMIT_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(10)
        self.log_file.close()


@dataclass
class ServerPool:
    """At most `resident` servers at a time; the one unused longest makes room.

    Attributes:
        arguments: of ``gimbal serve``, before each server's own flags.
        directory: where logs go.
        resident: servers alive at once. Only one is measured at a time, but an idle lock-step
            server still takes memory and a little CPU, so the default is 1.
        say: gets one line per start.
        command: what starts a server; it gets `arguments`, a port, flags and configuration.
    """

    arguments: tuple[str, ...]
    directory: Path
    resident: int = 1
    say: Callable[[str], None] = lambda _: None
    command: tuple[str, ...] = SERVE
    records: list[tuple[ServerSpec, Path]] = field(default_factory=list)
    """Where each server that places experts writes its rearrangements."""
    _servers: list[Server] = field(default_factory=list)
    _count: int = 0

    def get(self, spec: ServerSpec) -> Server:
        """The running server of `spec`, started if need be; raises RuntimeError if it cannot."""
        for server in self._servers:
            if server.spec == spec and server.process.poll() is None:
                self._servers.remove(server)
                self._servers.append(server)
                return server
        for dead in [s for s in self._servers if s.process.poll() is not None]:
            self._servers.remove(dead)
            dead.stop()
        while len(self._servers) >= self.resident:
            self._servers.pop(0).stop()
        with deferred():  # a server that nobody knows of would outlive this process
            server = self._start(spec)
            self._servers.append(server)
        server.wait_ready()
        self.say(f"server {self._count} ready after {server.start_s:.0f} s ({server.log})")
        return server

    def _start(self, spec: ServerSpec) -> Server:
        port = free_port()
        command = [*self.command, *self.arguments]
        command += ["--port", str(port), *spec.flags]
        self._count += 1
        command += ["--additional-config", f'{{"gimbal": {self._recorded(spec)}}}']
        log = self.directory / f"server-{self._count}.log"
        log_file = log.open("wb")
        # A process group of its own: Ctrl-C is for the benchmark, which then stops its servers.
        # Not a session: Linux shares cores between sessions, and a server in its own kept the
        # benchmark's client off them for seconds (docs/benchmarking.md).
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log_file,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
        endpoint = Endpoint(f"http://127.0.0.1:{port}")
        return Server(spec, endpoint, process, log, log_file)

    def _recorded(self, spec: ServerSpec) -> str:
        """The configuration, with a directory for rearrangements where there will be any."""
        config = json.loads(spec.config_json)
        placement = config.setdefault("placement", {})
        if "placement" not in config["levels"] or placement.get("records"):
            return spec.config_json
        path = (self.directory / f"server-{self._count}-records").resolve()
        placement["records"] = str(path)
        self.records.append((spec, path))
        return json.dumps(config, sort_keys=True)

    def close(self) -> None:
        """Stops every server; who is in a hurry and interrupts again does not leave one behind."""
        with deferred():
            while self._servers:
                self._servers.pop().stop()
