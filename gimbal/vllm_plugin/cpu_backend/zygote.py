"""Starts vLLM's CPU processes as forks of one process that has imported vLLM already.

A DP=2 server is six processes, and vLLM starts them with multiprocessing's ``spawn`` method, so
each imports torch and vLLM again: 8 to 10 s of a core apiece, most of the start of a small model.
Here the API server forks once, single-threaded, right after its imports; that copy (the zygote)
runs the standard library's fork server, and every later ``spawn`` in the API server or in an
engine becomes a fork of it. Nothing is inherited but imported modules: arguments still travel
pickled, and the child's environment is set to its starter's, as with ``spawn``.

One difference remains: OpenMP has read its environment before the fork, so the thread count and
the cores of a worker are applied by hand (`_apply_openmp`). Threads of one worker then share its
cores instead of being pinned one to one.

Used on CPU only; CUDA does not survive a fork.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from multiprocessing import context, forkserver, popen_forkserver, resource_tracker, spawn
from typing import Any

# What engines and workers import, beyond what the API server does.
WORKER_MODULES = ("vllm.v1.engine.core", "vllm.v1.worker.cpu_worker")
_ENVIRONMENT = "gimbal_environment"

# Private parts of the standard library, the same in 3.11 to 3.13.
_SERVER: Any = forkserver._forkserver  # type: ignore[attr-defined,unused-ignore]
_SPAWN_PROCESS: Any = context.SpawnProcess
_SPAWN: Any = spawn


def start(
    modules: Sequence[str] = WORKER_MODULES, on_exit: Callable[[int, int], None] | None = None
) -> int | None:
    """Forks the zygote and reroutes ``spawn`` to it; returns its process id.

    Returns None when that is not safe, and nothing has changed then. The zygote calls `on_exit`
    with process id and exit code of every process that it has forked (minus the signal, if one
    killed it): most starters never ask.

    Not safe: this process has other threads (a fork would copy the locks they hold), or is not
    on Linux with a Python whose fork server is known.
    """
    known = sys.platform.startswith("linux") and (3, 11) <= sys.version_info[:2] <= (3, 13)
    if not known or len(os.listdir("/proc/self/task")) > 1:
        return None
    address = os.path.join(tempfile.mkdtemp(prefix="zygote-"), "socket")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    alive_read, alive_write = os.pipe()
    _carry_environment()
    with suppress(ImportError):
        # It looks for argv by the environment's address, which is gone once a fork has replaced
        # its environment; asking once here lets every fork set its own title.
        import_module("setproctitle").getproctitle()
    # The collector would otherwise touch, and so copy, every page the processes share.
    gc.collect()
    gc.freeze()
    pid = os.fork()
    if pid == 0:
        if on_exit is not None:
            _tell(on_exit)
        _serve(listener, alive_read, alive_write, modules)
    os.close(alive_read)
    listener.close()
    _SERVER._forkserver_address = address
    _SERVER._forkserver_alive_fd = alive_write
    _reroute_spawn()
    return pid


def _reroute_spawn() -> None:
    """Makes ``spawn`` ask the zygote, here and in every process forked from here."""
    # The fork server that runs is the one to use; by default a process starts its own.
    _SERVER.ensure_running = resource_tracker.ensure_running
    _SPAWN_PROCESS._Popen = staticmethod(popen_forkserver.Popen)


def _serve(
    listener: socket.socket, alive_read: int, alive_write: int, modules: Sequence[str]
) -> None:
    """The zygote's life; ends when every process that could ask for another is gone."""
    code = 1
    try:
        os.close(alive_write)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        _reroute_spawn()
        for name in modules:
            with suppress(Exception):  # vLLM reports it in the process that needs the module
                import_module(name)
        gc.collect()
        gc.freeze()
        forkserver.main(listener.detach(), alive_read, [])
    except SystemExit:
        code = 0
    finally:
        os._exit(code)


def _tell(on_exit: Callable[[int, int], None]) -> None:
    """Calls `on_exit` whenever this process collects a child."""
    collect = os.waitpid

    def waitpid(pid: int, options: int) -> tuple[int, int]:
        found, status = collect(pid, options)
        if found:
            on_exit(found, os.waitstatus_to_exitcode(status))
        return found, status

    os.waitpid = waitpid


def _carry_environment() -> None:
    """Sends ``os.environ`` with every process start, as ``spawn`` does by itself."""
    pack, unpack = spawn.get_preparation_data, spawn.prepare

    def get_preparation_data(name: str) -> dict[str, Any]:
        return {**pack(name), _ENVIRONMENT: dict(os.environ)}

    def prepare(data: dict[str, Any]) -> None:
        environment = data.pop(_ENVIRONMENT, None)
        if environment is not None:
            os.environ.clear()
            os.environ.update(environment)
            _apply_openmp(environment)
            _apply_prometheus(environment)
        unpack(data)

    _SPAWN.get_preparation_data = get_preparation_data
    _SPAWN.prepare = prepare


def _apply_openmp(environment: dict[str, str]) -> None:
    """Thread count and cores of this process, from the variables vLLM sets for a worker."""
    cores = openmp_cores(environment)
    if not cores:
        return
    import torch

    os.sched_setaffinity(0, cores)
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS") or len(cores)))


def _apply_prometheus(environment: dict[str, str]) -> None:
    """With several API servers metrics live in files; the library chose when it was imported."""
    if "PROMETHEUS_MULTIPROC_DIR" in environment:
        from prometheus_client import values

        values.ValueClass = values.get_value_class()  # type: ignore[no-untyped-call]


def openmp_cores(environment: dict[str, str]) -> list[int]:
    """The cores that vLLM's OpenMP variables bind a worker to; empty when they bind none."""
    text = environment.get("GOMP_CPU_AFFINITY") or ""
    if not text and environment.get("OMP_PROC_BIND") == "true":
        text = environment.get("OMP_PLACES", "")
    if not text and "proclist=[" in environment.get("KMP_AFFINITY", ""):
        text = environment["KMP_AFFINITY"].partition("proclist=[")[2].partition("]")[0]
    return [int(part) for part in text.strip("{}").replace(",", " ").split()]
