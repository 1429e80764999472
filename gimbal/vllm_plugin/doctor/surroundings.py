"""Folders that can be written, and proxies: what containers lack and clusters set."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import urlsplit

from gimbal.core.caches import COMPILED, compiled_code, temporary_folder, user_cache
from gimbal.vllm_plugin.doctor.findings import Finding

PROXIES = ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")


def check_compiled_code(folder: Path | None, lasts: bool) -> Finding:
    """Where numba keeps compiled code (`compiled_code`)."""
    name = "compiled code"
    if folder is None:
        return Finding(
            name,
            "failed",
            "no folder can be written to keep it",
            f"every process would compile for itself, up to a minute of a core beside requests: "
            f"set {COMPILED} to a writable folder",
        )
    if not lasts:
        return Finding(
            name,
            "warning",
            f"{folder}: neither the package's folder nor a cache of yours can be written",
            f"gone with the container, so each one's first server compiles for some 15 s: set "
            f"{COMPILED} to a folder that stays",
        )
    return Finding(name, "ok", str(folder))


def check_temporary(folder: Path | None) -> Finding:
    """Where a server keeps its sockets while it lives."""
    if folder is None:
        return Finding(
            "temporary files",
            "failed",
            "no folder can be written",
            "gimbal serve cannot start: mount one at /tmp, or set TMPDIR",
        )
    return Finding("temporary files", "ok", str(folder))


def check_model_caches(environment: Mapping[str, str]) -> Finding:
    """Where vLLM and Hugging Face keep what they compile and download."""
    cache = user_cache() or Path("/.cache")
    vllm = Path(environment.get("VLLM_CACHE_ROOT") or cache / "vllm")
    models = Path(environment.get("HF_HOME") or cache / "huggingface")
    locked = {"VLLM_CACHE_ROOT": vllm, "HF_HOME": models}
    locked = {name: folder for name, folder in locked.items() if not _could_write(folder)}
    if not locked:
        return Finding("caches of vLLM", "ok", f"{vllm}, {models}")
    return Finding(
        "caches of vLLM",
        "warning",
        ", ".join(f"{folder} cannot be written" for folder in locked.values()),
        "models are not downloaded and compiled graphs not kept: set "
        f"{' and '.join(locked)} to writable folders, or serve a model's folder with "
        "--enforce-eager",
    )


def _could_write(folder: Path) -> bool:
    """Whether `folder`, or the nearest one above it that is there, can be written."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return os.access(folder, os.W_OK | os.X_OK)


def check_proxies(environment: Mapping[str, str]) -> Finding:
    """Whether requests to this machine would leave it."""
    found = {name: environment[name] for name in PROXIES if environment.get(name)}
    if not found:
        return Finding("proxy", "ok", "none")
    text = ", ".join(f"{name}={_without_secret(url)}" for name, url in found.items())
    spared = environment.get("no_proxy") or environment.get("NO_PROXY") or ""
    hosts = {host.strip() for host in spared.split(",")}
    if "*" in hosts or {"localhost", "127.0.0.1"} <= hosts:
        return Finding("proxy", "ok", f"{text}; no_proxy={spared}")
    return Finding(
        "proxy",
        "warning",
        f"{text}; no_proxy={spared or '(not set)'}",
        "gimbal asks servers of this machine directly, but curl and other clients would ask the "
        "proxy for them: no_proxy=localhost,127.0.0.1,::1",
    )


def _without_secret(url: str) -> str:
    """`url` less a user name and password."""
    host = urlsplit(url if "://" in url else f"//{url}").netloc.rpartition("@")[2]
    return host or "(no address)"


def check_surroundings() -> Iterator[Finding]:
    """Every check of this module in this process's surroundings."""
    yield check_compiled_code(*compiled_code())
    yield check_temporary(temporary_folder())
    yield check_model_caches(os.environ)
    yield check_proxies(os.environ)
