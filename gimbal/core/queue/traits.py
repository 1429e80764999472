"""What is left of section `queue` under an ordering that cannot do everything."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from gimbal.core.contracts import OrderingTraits

if TYPE_CHECKING:
    from gimbal.core.config import QueueConfig

_NEEDS: tuple[tuple[str, str, object], ...] = (
    ("max_wait_s", "age_limit", 0.0),
    ("in_batch", "shares_steps", False),
    ("pass_steps", "passes_blocked", 0),
    ("room_tokens", "passes_blocked", 0),
    ("graph_steps", "sizes_steps", 0.0),
    ("step_budget", "sizes_steps", False),
)
"""Option, the trait that it needs, and the value that switches it off."""


def usable(config: QueueConfig, traits: OrderingTraits) -> QueueConfig:
    """`config` with every option switched off that an ordering with `traits` cannot do."""
    off = {option: value for option, trait, value in _NEEDS if not getattr(traits, trait)}
    return replace(config, **off)  # type: ignore[arg-type]


def lacking(config: QueueConfig, traits: OrderingTraits) -> list[str]:
    """Options that `config` has on and that `usable` switches off, with the trait they need."""
    return [
        f"{option} ({trait})"
        for option, trait, value in _NEEDS
        if not getattr(traits, trait) and getattr(config, option) != value
    ]
