"""Has a server write no records while the file that QUIET_FILE names is there.

For `benchmarks/watched.py`, whose servers have this folder and tests/live/on_import in PYTHONPATH:
records are otherwise on for a server's whole life.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from changed_on_import import change_on_import

WRITERS = {
    "gimbal.vllm_plugin.engine.step_log": ("StepLog", "write"),
    "gimbal.vllm_plugin.dispatch.recording": ("Recording", "sent", "received"),
    "gimbal.vllm_plugin.placement.rebalance_log": ("RebalanceLog", "_append"),
}
LOOK_S = 0.1


class Quiet:
    """Whether the file is there, as of the last look."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.quiet, self.looked_s = False, 0.0

    def __call__(self) -> bool:
        now_s = time.monotonic()
        if now_s - self.looked_s > LOOK_S:
            self.looked_s, self.quiet = now_s, self.file.exists()
        return self.quiet


def only_aloud(function: Callable[..., Any], quiet: Quiet) -> Callable[..., Any]:
    """`function`, or nothing."""

    def write(*args: Any, **kwargs: Any) -> Any:
        return None if quiet() else function(*args, **kwargs)

    return write


def change(names: tuple[str, ...], quiet: Quiet) -> Callable[[ModuleType], None]:
    """Of methods of one class, whose name comes first."""

    def changed(module: ModuleType) -> None:
        owner = getattr(module, names[0])
        for name in names[1:]:
            setattr(owner, name, only_aloud(getattr(owner, name), quiet))

    return changed


if "QUIET_FILE" in os.environ:
    quiet_file = Quiet(Path(os.environ["QUIET_FILE"]))
    change_on_import({module: change(names, quiet_file) for module, names in WRITERS.items()})
