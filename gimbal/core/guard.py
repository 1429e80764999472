"""Fail open: a failing hook falls back to vLLM's behaviour, is counted and logged once."""

from __future__ import annotations

import logging
from collections.abc import Callable

from gimbal.core.errors import one_line

logger = logging.getLogger("vllm.gimbal")


class LevelGuard:
    """Counts one level's fallbacks and switches the level off after repeated failures.

    Args:
        level: name used in logs and in ``gimbal_fallback_total{level,reason}``.
        max_consecutive: this many failures without a success between them end the level.
        on_fallback: called with (level, reason) for the metric.
    """

    def __init__(
        self,
        level: str,
        max_consecutive: int = 20,
        on_fallback: Callable[[str, str], None] | None = None,
    ) -> None:
        self.level = level
        self.max_consecutive = max_consecutive
        self.on_fallback = on_fallback
        self.counts: dict[str, int] = {}
        self.disabled = False
        self._consecutive = 0

    def succeeded(self) -> None:
        self._consecutive = 0

    def fell_back(self, reason: str, error: BaseException | None = None) -> None:
        """Records one fallback. Only errors count towards switching the level off."""
        first = reason not in self.counts
        said = reason if error is None else f"{reason}: {one_line(error)}"
        self.counts[reason] = self.counts.get(reason, 0) + 1
        if self.on_fallback is not None:
            self.on_fallback(self.level, reason)
        if first:
            logger.warning(
                "Gimbal %s fell back to vLLM (%s); counted from now on, not logged again",
                self.level,
                said,
                exc_info=error,
            )
        if error is None:
            return
        self._consecutive += 1
        if self._consecutive >= self.max_consecutive and not self.disabled:
            self.disabled = True
            logger.error(
                "Gimbal switches its level %s off after %d consecutive failures (last: %s)",
                self.level,
                self._consecutive,
                said,
            )
