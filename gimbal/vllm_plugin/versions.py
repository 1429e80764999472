"""What differs between the versions of vLLM that Gimbal works with. No other module asks for one.

A difference that vLLM's own symbols show is read from them, not from a number: builds between two
releases are then read right. `seams` lists every symbol, and how each version's looks.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import re
from typing import Any

from gimbal.core.errors import InputError

logger = logging.getLogger("vllm.gimbal")

SUPPORTED = ((0, 32), (0, 33))
"""vLLM minor versions Gimbal works with; `docs/compatibility.md` says what was tested."""
ANY_VERSION = "GIMBAL_ANY_VLLM"
"""Environment variable: 1 has Gimbal try a version that it does not support."""


def supported_text(joined: str = "and") -> str:
    """The supported versions as words: "0.32 and 0.33"."""
    return f" {joined} ".join(f"{major}.{minor}" for major, minor in SUPPORTED)


def is_supported(version: str) -> bool:
    """Whether Gimbal works with `version` of vLLM, or is to try it."""
    match = re.match(r"(\d+)\.(\d+)", version)
    known = match is not None and (int(match[1]), int(match[2])) in SUPPORTED
    return known or os.environ.get(ANY_VERSION) == "1"


def check_version(version: str) -> None:
    """Raises InputError unless `version` is one Gimbal supports."""
    if not is_supported(version):
        raise InputError(
            f"vLLM {version} is not supported: Gimbal works with {supported_text()} "
            f"(`gimbal doctor` shows which symbols differ; {ANY_VERSION}=1 tries it all the same)"
        )


def running_is_supported() -> bool:
    """Whether Gimbal may act in the vLLM that has loaded it."""
    return is_supported(_running())


def say_unsupported() -> None:
    """Once per server: in the process that no other one of it has started."""
    if multiprocessing.parent_process() is None:
        logger.warning(
            "Gimbal does nothing: vLLM %s is not supported, %s are; %s=1 tries it all the same",
            _running(),
            supported_text(),
            ANY_VERSION,
        )


def _running() -> str:
    try:
        from vllm.version import __version__
    except ImportError:
        return "of an unknown version"
    return str(__version__)


# Since 0.33.

MEMORY_FOLLOWS_CORES = {"VLLM_CPU_SIM_MULTI_NUMA": "0"}
"""Has every CPU worker take the memory node of its cores. Since 0.33 each engine gets a node of its
own otherwise, by rank, and a worker without one does not start: two engines need two NUMA nodes."""


def prefill_interval_of_one(scheduler: Any) -> int:
    """Steps between two prefills of an engine that is alone; before 0.33 only groups had one."""
    return int(getattr(scheduler, "local_prefill_interval", 1))


def reuse_lookahead_tokens(vllm_config: Any) -> int:
    """Tokens behind a cached block on which its reuse depends, for the KV entries of a drafter.

    0.32 leaves out the last block that matches. Since 0.33 a block's hash covers the tokens behind
    it, so that it does not match where they differ.
    """
    speculative = vllm_config.speculative_config
    if speculative is None or not speculative.use_eagle_block_drop():
        return 0
    return int(getattr(vllm_config, "num_hash_lookahead_tokens", 0)) or 1


# Since 0.32.


async def all_engines_say(core: Any, method: str, *arguments: Any) -> list[Any]:
    """One answer per engine of vLLM's client `core`.

    0.31, which is not supported, asks all of them too, and hands on the first one's answer only.
    """
    of_all = getattr(core, "call_utility_all_async", None)
    if of_all is not None:
        answers: list[Any] = await of_all(method, *arguments)
        return answers
    of_one = core._call_utility_async
    return await asyncio.gather(*(of_one(method, *arguments, engine=e) for e in core.core_engines))
