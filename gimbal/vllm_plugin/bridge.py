"""From vLLM's configuration to Gimbal's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gimbal.core.config import GimbalConfig, parse_config

_cache: dict[int, tuple[Any, GimbalConfig | None]] = {}


def gimbal_config(vllm_config: Any) -> GimbalConfig | None:
    """The ``gimbal`` section of ``additional_config``, or None when Gimbal is not enabled.

    Raises InputError for an unknown key, so that a typo is seen at start and not in production.
    """
    extra = getattr(vllm_config, "additional_config", None)
    if not isinstance(extra, dict) or "gimbal" not in extra:
        return None
    key = id(vllm_config)
    hit = _cache.get(key)
    if hit is not None and hit[0] is vllm_config:
        return hit[1]
    config: GimbalConfig | None = parse_config(extra["gimbal"] or {}, "additional_config.gimbal")
    if config is not None and not config.enabled:
        config = None
    _cache[key] = (vllm_config, config)
    return config


def level_config(vllm_config: Any, level: str) -> GimbalConfig | None:
    """The configuration when `level` is switched on, else None."""
    config = gimbal_config(vllm_config)
    return config if config is not None and level in config.levels else None


def rust_front_end(environment: Mapping[str, str]) -> bool:
    """Whether vLLM serves through ``vllm-rs``, which loads no Python: see docs/features.md.

    vLLM itself takes whole numbers only and refuses everything else at start.
    """
    return environment.get("VLLM_USE_RUST_FRONTEND", "0").strip() not in ("", "0")
