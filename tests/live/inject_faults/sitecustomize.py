"""Has functions of every level raise, in every process of a server that has this folder and
on_import in PYTHONPATH.

FAULTS_FILE in its environment names a file. While it is there, each call of a function below fails
with the probability that the file holds. FAULTS_SEED makes two runs of a process draw alike.
Functions are changed as their modules are imported, by their code: whoever imported one by name
meets the fault as well.
"""

import os
import random
import time
from multiprocessing import current_process
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from changed_on_import import Change, change_on_import

FUNCTIONS = {
    "gimbal.core.dispatch.dispatcher": ("Dispatcher.dispatch", "Dispatcher.finished"),
    "gimbal.vllm_plugin.dispatch.request": ("describe", "left_to_vllm"),
    "gimbal.vllm_plugin.dispatch.hook": ("FrontEnd._count", "FrontEnd._placed", "FrontEnd.refresh"),
    "gimbal.vllm_plugin.engine.signals": (
        "SchedulerSignals.accepted",
        "SchedulerSignals.enqueued",
        "SchedulerSignals.scheduled",
        "SchedulerSignals.completed",
        "SchedulerSignals.freed",
    ),
    "gimbal.core.queue.heap": ("WaitingHeap.add", "WaitingHeap.peek", "WaitingHeap.take"),
    "gimbal.vllm_plugin.queue.level": ("QueueLevel.begin_step", "QueueLevel.end_step"),
    "gimbal.vllm_plugin.placement.window": ("WindowNotes.written", "reduce_window", "carry_over"),
    "gimbal.vllm_plugin.placement.controller": ("Controller.measure", "Controller.watch"),
    "gimbal.vllm_plugin.placement.hook": ("batch_tokens", "attach_news"),
    "gimbal.core.placement.planner": ("Planner.decide",),
}
LOOK_S = 0.1


class Draws:
    """One process's draws, and the probability as last read."""

    def __init__(self, file: Path, seed: str) -> None:
        self.file, self.seed = file, seed
        self.share = self.looked_s = 0.0
        self.process, self.generator = 0, random.Random()

    def due(self) -> bool:
        now_s = time.monotonic()
        if now_s - self.looked_s > LOOK_S:
            self.looked_s = now_s
            try:
                self.share = float(self.file.read_text())
            except (OSError, ValueError):
                self.share = 0.0
        if not self.share:
            return False
        if self.process != os.getpid():  # a fork
            self.process = os.getpid()
            self.generator = random.Random(f"{self.seed} {current_process().name}")
        return self.generator.random() < self.share


def _trampoline(*args: Any, **kwargs: Any) -> Any:
    target: Any = "target"
    return target(*args, **kwargs)


def make_fail(function: Any, draws: Draws) -> None:
    """Exchanges the code of `function`."""
    code = function.__code__
    original = FunctionType(code, function.__globals__, function.__name__, function.__defaults__)
    original.__kwdefaults__ = function.__kwdefaults__

    def target(*args: Any, **kwargs: Any) -> Any:
        if draws.due():
            raise RuntimeError(f"injected into {code.co_qualname}")
        return original(*args, **kwargs)

    template = _trampoline.__code__
    constants = tuple(target if c == "target" else c for c in template.co_consts)
    function.__code__ = template.replace(co_consts=constants, co_name=code.co_name)


def failing(names: tuple[str, ...], draws: Draws) -> Change:
    """Has the functions `names` of a module fail."""

    def change(module: ModuleType) -> None:
        for name in names:
            found: Any = module
            for part in name.split("."):
                found = getattr(found, part)
            make_fail(found, draws)

    return change


if "FAULTS_FILE" in os.environ:
    file, seed = Path(os.environ["FAULTS_FILE"]), os.environ.get("FAULTS_SEED", "0")
    drawn = Draws(file, seed)
    change_on_import({module: failing(names, drawn) for module, names in FUNCTIONS.items()})
