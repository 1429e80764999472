"""CPU features, cores, memory, shared memory, and the default port."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from gimbal.core.errors import InputError
from gimbal.vllm_plugin.doctor.findings import Finding
from gimbal.vllm_plugin.serve.checks import check_port, visible_gpus

DEMO_MEMORY_GIB = 6.0
"""Free memory the DP=2 demo server wants: 4.3 GiB resident when idle, and room for requests."""
SHARED_MEMORY_MIB = 256
_KERNELS = ("avx512_bf16", "avx512f", "amx_tile", "amx_bf16")


def cpu_flags(cpuinfo: str) -> set[str]:
    """Feature flags of the first CPU in the text of ``/proc/cpuinfo``."""
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return set(value.split())
    return set()


def check_cpu(flags: Iterable[str], machine: str, cores: int) -> Finding:
    """vLLM's CPU kernels: AVX2 at least on x86-64."""
    flags = set(flags)
    text = f"{machine}, {cores} cores usable"
    if machine not in ("x86_64", "AMD64"):
        return Finding("CPU", "ok", text)
    if "avx2" not in flags:
        return Finding("CPU", "failed", f"{text}, no AVX2", "vLLM's CPU kernels need AVX2")
    faster = [name for name in _KERNELS if name in flags]
    text += ", AVX2" + "".join(f", {name}" for name in faster)
    if cores < 2:
        return Finding(
            "CPU", "warning", text, "with one core, DP=2 engines take turns; timings mean little"
        )
    return Finding("CPU", "ok", text)


def check_memory(meminfo: str) -> Finding:
    """Free memory, from the text of ``/proc/meminfo``."""
    kib = {}
    for line in meminfo.splitlines():
        name, _, value = line.partition(":")
        kib[name] = int(value.split()[0]) if value.split() else 0
    available_gib = kib.get("MemAvailable", 0) / 2**20
    text = f"{available_gib:.1f} GiB available"
    if available_gib < DEMO_MEMORY_GIB:
        return Finding(
            "memory", "warning", text, f"the DP=2 demo server wants {DEMO_MEMORY_GIB:g} GiB free"
        )
    return Finding("memory", "ok", text)


def check_shared_memory(free_bytes: int | None) -> Finding:
    """Room below /dev/shm for vLLM's message queues and Gimbal's board (None: no such folder)."""
    if free_bytes is None:
        return Finding("shared memory", "warning", "no /dev/shm", "vLLM's worker queues need it")
    text = f"{free_bytes / 2**20:.0f} MiB free in /dev/shm"
    if free_bytes < SHARED_MEMORY_MIB * 2**20:
        return Finding(
            "shared memory",
            "failed",
            text,
            f"needs {SHARED_MEMORY_MIB} MiB, or engines end while starting: --shm-size=1g or "
            "--ipc=host (Kubernetes: an emptyDir of medium Memory at /dev/shm)",
        )
    return Finding("shared memory", "ok", text)


def check_default_port(port: int = 8000) -> Finding:
    try:
        check_port(None, port)
    except InputError as error:
        return Finding(f"port {port}", "warning", str(error), "gimbal serve --port N")
    return Finding(f"port {port}", "ok", "free")


def check_machine() -> Iterator[Finding]:
    """Every check of this module on this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield check_cpu(cpu_flags(_read("/proc/cpuinfo")), os.uname().machine, cores or 1)
    gpus = visible_gpus()
    yield Finding("GPUs", "ok", "none seen (CPU serving)" if not gpus else f"{gpus} visible")
    yield check_memory(_read("/proc/meminfo"))
    shared = Path("/dev/shm")
    yield check_shared_memory(shutil.disk_usage(shared).free if shared.is_dir() else None)
    yield check_default_port()


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
