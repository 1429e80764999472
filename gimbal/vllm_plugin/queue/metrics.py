"""Waiting time by size of the prompt, in the front end's ``/metrics``.

vLLM reports the queue time of each finished request to its stat loggers; one more of them, added
only where the queue level is on and statistics are not switched off, sorts it by uncached prompt
tokens. The queue's own counters (overtakes, promotions, longest wait against its bound) come from
the engines' snapshots: ``gimbal_engine_queue_*``. The histogram has no engine in its labels, which
would make thousands of series of it; vLLM's own ``vllm:request_queue_time_seconds`` has.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache, wraps
from typing import Any

from gimbal.core.guard import LevelGuard
from gimbal.vllm_plugin.bridge import level_config
from gimbal.vllm_plugin.metrics import MODEL, announce_build, model_name

SIZE_CLASSES = ((128, "0-127"), (512, "128-511"), (2048, "512-2047"), (float("inf"), "2048+"))
"""Upper bound (exclusive) of uncached prompt tokens, and the label of the class."""

_BUCKETS = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 60.0, 120.0, 300.0)


def size_class(uncached_tokens: float) -> str:
    """Label of the class that a prompt belongs to."""
    return next(label for below, label in SIZE_CLASSES if uncached_tokens < below)


@lru_cache(maxsize=1)
def _histogram() -> Any:
    from prometheus_client import Histogram

    return Histogram(
        "gimbal_queue_time_seconds",
        "Time from queueing to first scheduling, by uncached prompt tokens",
        (MODEL, "uncached_tokens"),
        buckets=_BUCKETS,
    )


@lru_cache(maxsize=1)
def _logger_class() -> type:
    from vllm.v1.metrics.loggers import StatLoggerBase

    class QueueTimeLogger(StatLoggerBase):  # type: ignore[misc]
        """Observes the queue time of one engine's finished requests."""

        def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
            self.guard = LevelGuard("queue")
            model = model_name(vllm_config)
            self.by_class = {label: _histogram().labels(model, label) for _, label in SIZE_CLASSES}

        def record(
            self,
            scheduler_stats: Any,
            iteration_stats: Any,
            mm_cache_stats: Any = None,
            engine_idx: int = 0,
        ) -> None:
            if iteration_stats is not None and not self.guard.disabled:
                self.guard.run("metrics", observe, self.by_class, iteration_stats)

        def log_engine_initialized(self) -> None:
            """Nothing to say once an engine is up."""

    return QueueTimeLogger


def observe(by_class: Mapping[str, Any], iteration_stats: Any) -> None:
    """Enters the requests that finished in one of vLLM's iterations."""
    for finished in iteration_stats.finished_requests:
        uncached = finished.num_prompt_tokens - finished.num_cached_tokens
        # Negative for a request that ended without having been scheduled.
        if finished.queued_time >= 0.0:
            by_class[size_class(uncached)].observe(finished.queued_time)


def install() -> None:
    """Gives every ``StatLoggerManager`` of a server with the queue level one more logger."""
    from vllm.v1.metrics.loggers import StatLoggerManager

    StatLoggerManager.__init__ = _with_queue_times(StatLoggerManager.__init__)


def _with_queue_times(original: Any) -> Any:
    @wraps(original)
    def init(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        original(self, vllm_config, *args, **kwargs)
        LevelGuard("queue").run("metrics", _add_logger, self, vllm_config)

    return init


def _add_logger(manager: Any, vllm_config: Any) -> None:
    if level_config(vllm_config, "queue") is None:
        return
    announce_build()
    from vllm.v1.metrics.loggers import PerEngineStatLoggerAdapter

    adapter = PerEngineStatLoggerAdapter(
        vllm_config=vllm_config,
        engine_indexes=manager.engine_indexes,
        per_engine_stat_logger_factory=_logger_class(),
    )
    manager.stat_loggers.append(adapter)
