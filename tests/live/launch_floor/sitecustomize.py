"""Gives a server without CUDA graphs the floor that launches make beyond their largest.

With LAUNCH_FLOOR=TOKENS:MS in its environment a server believes that graphs cover steps of up to
TOKENS tokens, and every larger step of an engine takes at least MS milliseconds. With
LAUNCH_TOLD=1 engines are told that their steps take what they would on a machine of constant speed,
so that what they conclude does not depend on the one they run on. Read by every process of a server
that has this folder and on_import in PYTHONPATH.
"""

import os
import time
from types import ModuleType
from typing import Any

from changed_on_import import Change, change_on_import


def slow_down(module: ModuleType, tokens: int, floor_s: float) -> None:
    """The worker's steps."""
    execute_model = module.CPUWorker.execute_model

    def execute(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        result = execute_model(self, scheduler_output, *args, **kwargs)
        if scheduler_output.total_num_scheduled_tokens > tokens:
            time.sleep(max(0.0, floor_s - (time.perf_counter() - started)))
        return result

    module.CPUWorker.execute_model = execute


def tell(module: ModuleType, tokens: int, floor_us: float) -> None:
    """Engines learn from 10 ms a step, 10 us a prefill token, 30 us a decode, and the floor."""
    observe = module.GraphStepCosts.observe

    def observed(
        self: Any, decodes: float, duration_us: float, prefill_tokens: float, step_tokens: float
    ) -> None:
        told_us = 10_000.0 + 10.0 * prefill_tokens + 30.0 * decodes
        if step_tokens > tokens:
            told_us = max(told_us, floor_us)
        observe(self, decodes, told_us, prefill_tokens, step_tokens)

    module.GraphStepCosts.observe = observed


if "LAUNCH_FLOOR" in os.environ:
    largest, milliseconds = map(int, os.environ["LAUNCH_FLOOR"].split(":"))
    changes: dict[str, Change] = {
        "vllm.v1.worker.cpu_worker": lambda m: slow_down(m, largest, milliseconds / 1e3),
        "gimbal.vllm_plugin.engine.state": lambda m: setattr(
            m, "graph_tokens", lambda vllm_config: largest
        ),
    }
    if os.environ.get("LAUNCH_TOLD") == "1":
        changes["gimbal.core.queue.graph_steps"] = lambda m: tell(m, largest, milliseconds * 1e3)
    change_on_import(changes)
