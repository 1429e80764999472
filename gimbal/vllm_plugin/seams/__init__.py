"""Every vLLM symbol Gimbal patches, subclasses or calls into, with the signature it expects.

`SEAMS` is the one list that says what a new vLLM version can break; one table per level.
"""

from __future__ import annotations

from gimbal.vllm_plugin.seams import cpu_backend, dispatch, placement, queue, serve
from gimbal.vllm_plugin.seams.check import SeamProblem, check_seams
from gimbal.vllm_plugin.seams.table import Seam

__all__ = ["SEAMS", "Seam", "SeamProblem", "check_seams"]

SEAMS: tuple[Seam, ...] = (
    *dispatch.SEAMS,
    *serve.SEAMS,
    *cpu_backend.SEAMS,
    *placement.SEAMS,
    *queue.SEAMS,
)
