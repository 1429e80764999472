"""One ``gimbal serve`` process for a check, and what it says about its migrations and memory."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from gimbal.bench.endpoint import Endpoint
from gimbal.bench.servers import free_port
from gimbal.core.config_sources import parse_levels

READY_LIMIT_S = 300.0
STOP_LIMIT_S = 60.0
WORKER_NAME = re.compile(r"VLLM::Worker")


@dataclass(frozen=True, slots=True)
class ServerLayout:
    """How one model is laid out over ranks, and how its experts migrate.

    Attributes:
        dp, tp: data and tensor parallel sizes; experts are parallel over dp * tp when `ep`.
        ep: expert parallelism.
        redundant: physical experts beyond the logical ones.
        asynchronous: EPLB moves experts in a thread of each worker.
        step_interval: engine steps between rearrangements; 0 switches EPLB off.
        dtype: of weights and activations.
    """

    dp: int = 1
    tp: int = 1
    ep: bool = False
    redundant: int = 0
    asynchronous: bool = False
    step_interval: int = 0
    dtype: str = "bfloat16"

    @property
    def name(self) -> str:
        parts = [f"DP={self.dp}"] if not self.ep else [f"DP={self.dp}", f"EP={self.dp * self.tp}"]
        if self.tp > 1:
            parts.insert(1, f"TP={self.tp}")
        if self.dtype != "bfloat16":
            parts.append(self.dtype)
        if self.step_interval:
            parts.append(f"+{self.redundant}" if self.redundant else "+0")
            parts.append("async" if self.asynchronous else "sync")
        return " ".join(parts)

    def flags(self) -> list[str]:
        """The flags of ``gimbal serve``."""
        out = ["--data-parallel-size", str(self.dp), "--tensor-parallel-size", str(self.tp)]
        out += ["--dtype", self.dtype]
        if self.ep:
            out.append("--enable-expert-parallel")
        if self.step_interval:
            eplb = {
                "window_size": max(10, self.step_interval // 4),
                "step_interval": self.step_interval,
                "num_redundant_experts": self.redundant,
                "use_async": self.asynchronous,
                "communicator": "torch_gloo",
            }
            out += ["--enable-eplb", "--eplb-config", json.dumps(eplb)]
        return out


@dataclass
class CheckedServer:
    """Context manager: a ready server on entry, nothing left of it on exit.

    Attributes:
        plain_vllm: start vLLM's own server, which loads the plugin by itself, not ``gimbal serve``.
        levels: Gimbal's levels, as in ``--levels``; None leaves its section out of plain vLLM's.
    """

    model: Path
    layout: ServerLayout
    log: Path
    extra: tuple[str, ...] = ()
    plain_vllm: bool = False
    levels: str | None = "none"
    port: int = 0
    start_s: float = 0.0
    _process: subprocess.Popen[bytes] | None = field(default=None, repr=False)
    _out: IO[bytes] | None = field(default=None, repr=False)

    def __enter__(self) -> CheckedServer:
        # The default action of SIGTERM would end this process and leave the server behind.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        self.port = free_port()
        command = self._launcher()
        command += ["--served-model-name", "m", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--enforce-eager", *self.layout.flags(), *self.extra]
        self._out = self.log.open("wb")
        # The migration report is read through vLLM's development endpoint.
        environment = {**os.environ, "VLLM_SERVER_DEV_MODE": "1"}
        if "--kv-cache-memory-bytes" not in self.extra:  # which the variable would override
            environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        if self.plain_vllm:
            cores = (str(rank % (os.cpu_count() or 1)) for rank in range(self.layout.dp))
            binding = "|".join(core for core in cores for _ in range(self.layout.tp))
            environment.setdefault("VLLM_CPU_OMP_THREADS_BIND", binding)
            environment.setdefault("VLLM_CPU_SIM_MULTI_NUMA", "0")
        began = time.monotonic()
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=self._out,
            stderr=subprocess.STDOUT,
            env=environment,
            process_group=0,
        )
        try:
            self._wait_ready(began)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        self.start_s = time.monotonic() - began
        return self

    def _launcher(self) -> list[str]:
        if not self.plain_vllm:
            serve = [sys.executable, "-m", "gimbal.cli", "serve", str(self.model)]
            return [*serve, "--levels", self.levels or "none"]
        serve = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
        serve += ["--model", str(self.model)]
        if self.levels is None:
            return serve
        section = json.dumps({"gimbal": {"levels": parse_levels(self.levels)}})
        return [*serve, "--additional-config", section]

    def _wait_ready(self, began: float) -> None:
        assert self._process is not None
        endpoint = Endpoint(self.url, timeout_s=5.0)
        while not endpoint.healthy():
            if self._process.poll() is not None:
                raise RuntimeError(f"the server ended while starting:\n{self.log_end()}")
            if time.monotonic() - began > READY_LIMIT_S:
                raise RuntimeError(f"not ready after {READY_LIMIT_S:g} s:\n{self.log_end()}")
            time.sleep(0.5)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(STOP_LIMIT_S)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait(10)
        if self._out is not None:
            self._out.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def log_end(self, lines: int = 20) -> str:
        text = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join([*text[-lines:], f"(whole log: {self.log})"])

    def call_workers(self, method: str) -> list[Any]:
        """Runs `method` on every worker of every engine; the first engine's answers."""
        body = json.dumps({"method": method}).encode()
        request = urllib.request.Request(f"{self.url}/collective_rpc", body)
        with urllib.request.urlopen(request, timeout=60) as reply:
            text = reply.read()
        return list(json.loads(text)["results"]) if text else []

    def migrations(self) -> dict[str, Any]:
        """The first worker's migration report, empty without EPLB."""
        answers = self.call_workers("gimbal_migrations") if self.layout.step_interval else []
        return dict(answers[0]) if answers else {}

    def metric(self, name: str, **labels: str) -> float:
        """Sum of the samples of `name` that carry all `labels`."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as reply:
            text = reply.read().decode()
        total = 0.0
        for line in text.splitlines():
            sample, _, value = line.rpartition(" ")
            if sample.partition("{")[0] == name and all(
                f'{key}="{wanted}"' in sample for key, wanted in labels.items()
            ):
                total += float(value)
        return total

    @property
    def runs(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def processes(self) -> list[int]:
        """Process ids of the whole server."""
        import psutil

        assert self._process is not None
        root = psutil.Process(self._process.pid)
        return [root.pid, *(child.pid for child in root.children(recursive=True))]

    def resident_bytes(self) -> tuple[int, int]:
        """(all workers, whole server) resident memory now."""
        import psutil

        assert self._process is not None
        workers = total = 0
        root = psutil.Process(self._process.pid)
        for process in [root, *root.children(recursive=True)]:
            try:
                resident = process.memory_info().rss
                title = " ".join(process.cmdline()) or process.name()
            except psutil.NoSuchProcess:
                continue
            total += resident
            workers += resident if WORKER_NAME.search(title) else 0
        return workers, total
