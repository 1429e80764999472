"""The hooks that act once, as a server starts, and those that only count: vLLM's part faked."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import faults
import torch
from vllm.v1.metrics.stats import FinishedRequestStats, IterationStats

from gimbal.board.file import board_path
from gimbal.vllm_plugin.cpu_backend import activation
from gimbal.vllm_plugin.cpu_backend import hook as cpu_backend
from gimbal.vllm_plugin.engine import identity
from gimbal.vllm_plugin.queue import metrics

ITERATIONS = 60


def _config() -> Any:
    parallel = SimpleNamespace(data_parallel_size=2, data_parallel_external_lb=False)
    levels = ["dispatch", "queue", "placement"]
    return SimpleNamespace(
        additional_config={"gimbal": {"levels": levels}},
        parallel_config=parallel,
        model_config=SimpleNamespace(served_model_name="demo"),
    )


class _Engines:
    def __init__(self, local_engine_count: int, vllm_config: Any) -> None:
        self.started = local_engine_count


class Engines(_Engines):
    """Stands for vLLM's ``CoreEngineProcManager``."""

    __init__ = identity._after_the_board(_Engines.__init__)


class _Loggers:
    def __init__(self, vllm_config: Any, engine_idxs: list[int]) -> None:
        self.engine_indexes = engine_idxs
        self.stat_loggers: list[Any] = ["vLLM's own"]


class Loggers(_Loggers):
    """Stands for vLLM's ``StatLoggerManager``."""

    __init__ = metrics._with_queue_times(_Loggers.__init__)


class _Experts:
    def __init__(self) -> None:
        self.device_index = None
        self.is_async = False
        maps = torch.zeros((1, 2), dtype=torch.int64)
        model = SimpleNamespace(physical_to_logical_map=maps, rebalanced=False)
        self.model_states, self.steps = {"m": model}, 0

    def step(self) -> None:
        self.steps += 1
        self.model_states["m"].physical_to_logical_map += 1


class Experts(_Experts):
    """Stands for vLLM's ``EplbState`` on CPU."""

    __init__ = activation._init_on_host(_Experts.__init__)
    step = activation._counted_step(_Experts.step)


class _Arguments:
    enable_expert_parallel = True
    additional_config: dict[str, Any] = {}  # noqa: RUF012

    def create_engine_config(self) -> str:
        return "vLLM's own"


class Arguments(_Arguments):
    """Stands for vLLM's ``EngineArgs`` of a server without Gimbal."""

    create_engine_config = cpu_backend._allowing_expert_parallelism(_Arguments.create_engine_config)


class Life:
    """One start, and some finished requests."""

    ENTRIES = (
        "cpu_backend.hook:_allowing_expert_parallelism",
        "cpu_backend.activation:_init_on_host",
        "cpu_backend.activation:_counted_step",
    )

    def run(self) -> None:
        activation._GUARD.disabled = False
        metrics._logger_class.cache_clear()
        config = _config()
        self.arguments = Arguments().create_engine_config()
        self.engines = Engines(2, vllm_config=config)
        self.loggers = Loggers(config, [0, 1])
        self.experts = Experts()
        for _ in range(ITERATIONS):
            iteration = IterationStats()
            iteration.finished_requests = [FinishedRequestStats("stop", num_prompt_tokens=300)]
            for logger in self.loggers.stat_loggers[1:]:
                logger.record(None, iteration, engine_idx=1)
            self.experts.step()
        with faults.by_the_test():
            board_path(os.environ[identity.RUN_ID]).unlink(missing_ok=True)

    def wrong(self) -> str | None:
        """What vLLM has not done."""
        if self.arguments != "vLLM's own":
            return "the configuration is not vLLM's"
        if self.engines.started != 2:
            return "the engines are not started"
        if self.loggers.stat_loggers[0] != "vLLM's own" or len(self.loggers.stat_loggers) > 2:
            return f"loggers: {self.loggers.stat_loggers}"
        if self.experts.steps != ITERATIONS or self.experts.device_index != 0:
            return f"{self.experts.steps} steps of the experts"
        return None
