"""Compiles the planner once per machine, in a process that serves nobody.

numba keeps what it compiled in its cache, so only a machine's first server has to. That takes
some 15 s of a core by itself, but minutes in every worker of a server at work. `gimbal serve`
therefore starts ``python -m gimbal.vllm_plugin.placement.compiling`` beside vLLM's imports; the
workers wait for its lock in a thread that takes no CPU, and then read the cache.
"""

from __future__ import annotations

import fcntl
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from gimbal.core.caches import compiled_code
from gimbal.core.config import PlacementConfig
from gimbal.core.placement.planner import ModelFacts, Planner, planner_for

logger = logging.getLogger("vllm.gimbal")

_ANY_MODEL = ModelFacts(1e6, 2, 1e3, False, "allgather_reducescatter", 100)
_NICE = 5
"""The server's start goes first."""


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Held by one process of this machine at a time; by all where locks are not supported."""
    with open(__file__, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            logger.info("Gimbal placement: every worker compiles by itself (%s)", error)
        yield


def warm_up(planner: Planner) -> float:
    """Makes `planner` ready to plan; returns the seconds that took, waiting included."""
    start = time.monotonic()
    folder, _ = compiled_code()
    logger.info("Gimbal placement: compiles its planner, or reads it from %s", folder or "nowhere")
    with one_at_a_time():
        planner.warm_up()
    return time.monotonic() - start


def in_background() -> subprocess.Popen[bytes]:
    """Starts a process that fills numba's cache and ends."""
    return subprocess.Popen(
        [sys.executable, "-m", __name__],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def main() -> None:
    """Fills numba's cache."""
    os.nice(_NICE)
    warm_up(planner_for(PlacementConfig(), _ANY_MODEL))


if __name__ == "__main__":
    main()
