"""Installs every hook once per process. The order is the order of `HOOKS`."""

from __future__ import annotations

import logging
from importlib import import_module

from gimbal.vllm_plugin import versions

logger = logging.getLogger("vllm.gimbal")

HOOKS: tuple[str, ...] = (
    "cpu_backend.hook",
    "engine.identity",
    "engine.scheduler",
    "engine.refusals",
    "dispatch.hook",
    "dispatch.unsent",
    "queue.metrics",
    "placement.hook",
)
"""Modules of this package with an idempotent ``install()``; each patches only seams it lists."""

_installed: set[str] = set()


def install_all() -> None:
    """Runs each hook's ``install()`` once; one that fails is logged and leaves vLLM as it was.

    A version of vLLM that is not supported is left alone, which one line says.
    """
    if not versions.running_is_supported():
        versions.say_unsupported()
        return
    for name in HOOKS:
        if name in _installed:
            continue
        _installed.add(name)
        try:
            import_module(f"gimbal.vllm_plugin.{name}").install()
        except Exception:
            logger.exception("Gimbal: hook %s could not be installed; vLLM runs without it", name)
