"""Lets a vLLM configuration with Gimbal, CPU and expert parallelism pass, and picks our worker."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator
from typing import Any

from gimbal.core.errors import InputError
from gimbal.vllm_plugin.bridge import gimbal_config

logger = logging.getLogger("vllm.gimbal")

STOCK_WORKER = "vllm.v1.worker.cpu_worker.CPUWorker"
EXPERT_PARALLEL_WORKER = "gimbal.vllm_plugin.cpu_backend.worker.ExpertParallelCPUWorker"


def install() -> None:
    """Wraps ``EngineArgs.create_engine_config``; once per process, inert unless `wanted`."""
    from vllm.engine.arg_utils import EngineArgs

    original = EngineArgs.create_engine_config
    if not getattr(original, "gimbal_cpu_backend", False):
        EngineArgs.create_engine_config = _allowing_expert_parallelism(original)


def _allowing_expert_parallelism(original: Any) -> Any:
    @functools.wraps(original)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            ours = wanted(self)
        except InputError:
            raise  # a bad configuration must be seen at start
        except Exception:
            logger.exception("Gimbal: no expert parallelism on CPU; vLLM decides what it can run")
            ours = False
        if not ours:
            return original(self, *args, **kwargs)
        return _expert_parallel_config(original, self, *args, **kwargs)

    create_engine_config.gimbal_cpu_backend = True  # type: ignore[attr-defined]
    return create_engine_config


def wanted(engine_args: Any) -> bool:
    """Whether these engine arguments ask for expert parallelism on CPU under Gimbal.

    Raises InputError when the ``gimbal`` section has an unknown key.
    """
    from vllm.platforms import current_platform

    return bool(
        engine_args.enable_expert_parallel
        and current_platform.is_cpu()
        and gimbal_config(engine_args) is not None
    )


def _expert_parallel_config(original: Any, args: Any, *rest: Any, **kwargs: Any) -> Any:
    """Calls `original` with EPLB allowed on CPU and the worker class replaced in its result."""
    if not args.enforce_eager:
        # Dynamo traces straight through vLLM's CPU experts, and local work has
        # data-dependent shapes: a compiled graph would need one per batch.
        logger.info("Gimbal: expert parallelism on CPU runs eagerly (as with --enforce-eager)")
        args.enforce_eager = True
    if args.enable_eplb:
        _choose_eplb_communicator(args.eplb_config)
        with _eplb_allowed_on_cpu():
            config = original(args, *rest, **kwargs)
    else:
        config = original(args, *rest, **kwargs)
    worker = config.parallel_config.worker_cls
    if worker not in (STOCK_WORKER, EXPERT_PARALLEL_WORKER):
        raise InputError(
            f"--worker-cls {worker}: expert parallelism on CPU needs Gimbal's own worker class; "
            "leave --worker-cls out"
        )
    config.parallel_config.worker_cls = EXPERT_PARALLEL_WORKER
    return config


def _choose_eplb_communicator(eplb_config: Any) -> None:
    """Gloo is the only EPLB transport that moves weights between CPU ranks."""
    if eplb_config.communicator is None:
        eplb_config.communicator = "torch_gloo"
    elif eplb_config.communicator != "torch_gloo":
        raise InputError(
            f"--eplb-config communicator {eplb_config.communicator!r}: on CPU only "
            "'torch_gloo' works (or leave it out)"
        )


class _PlatformAllowingEplb:
    """The current platform, except that it passes the check in front of ``enable_eplb``."""

    def __init__(self, platform: Any) -> None:
        self._platform = platform

    def __getattr__(self, name: str) -> Any:
        return getattr(self._platform, name)

    def is_cuda_alike(self) -> bool:
        return True


@contextlib.contextmanager
def _eplb_allowed_on_cpu() -> Iterator[None]:
    """While one configuration is built, ``vllm.config.parallel`` sees a platform with EPLB.

    The check sits in a pydantic validator, compiled into its class: its only handle is the name
    it reads the platform from. That module asks ``is_cuda_alike`` for nothing else (0.32, 0.33).
    """
    from vllm.config import parallel

    platform = parallel.current_platform
    parallel.current_platform = _PlatformAllowingEplb(platform)
    try:
        yield
    finally:
        parallel.current_platform = platform
