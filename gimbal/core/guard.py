"""Fail open: a failing hook falls back to vLLM's behaviour, is counted and logged once.

Whatever vLLM calls into hands its work to `LevelGuard.run`, and calls vLLM's own function outside
it, exactly once. What `run` could not do is answered by vLLM.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import TypeVar, TypeVarTuple

from gimbal.core.errors import one_line

logger = logging.getLogger("vllm.gimbal")

Ts = TypeVarTuple("Ts")
T = TypeVar("T")


class LevelGuard:
    """Counts one level's fallbacks and switches the level off after repeated failures.

    Nothing here raises: neither a metric that fails nor an error that cannot be printed ends a
    request.

    Args:
        level: name used in logs and in ``gimbal_fallback_total{level,reason}``.
        max_consecutive: this many failures for one reason, without a success of what failed between
            them, end the level.
        on_fallback: called with (level, reason) for the metric.

    Attributes:
        counts: fallbacks by reason.
        disabled: the level is off until the process ends. Hooks ask before they do anything.
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
        self._failing: dict[str, int] = {}  # reason -> failures since its last success

    def run(self, reason: str, action: Callable[[*Ts], T], /, *args: *Ts) -> T | None:
        """What `action` answers, or None where it raises, which is counted as `reason`."""
        try:
            answer = action(*args)
        except Exception as error:
            self.fell_back(reason, error)
            return None
        if self._failing:
            self._failing.pop(reason, None)
        return answer

    def succeeded(self, reason: str) -> None:
        """What failed for `reason` works again."""
        self._failing.pop(reason, None)

    def fell_back(self, reason: str, error: BaseException | None = None) -> None:
        """Records one fallback. Only errors count towards switching the level off."""
        first = reason not in self.counts
        self.counts[reason] = self.counts.get(reason, 0) + 1
        with contextlib.suppress(Exception):
            if self.on_fallback is not None:
                self.on_fallback(self.level, reason)
        said = reason if error is None else f"{reason}: {_said(error)}"
        if first:
            logger.warning(
                "Gimbal %s fell back to vLLM (%s); counted from now on, not logged again",
                self.level,
                said,
                exc_info=error,
            )
        if error is None:
            return
        failures = self._failing[reason] = self._failing.get(reason, 0) + 1
        if failures >= self.max_consecutive and not self.disabled:
            self.disabled = True
            logger.error(
                "Gimbal switches its level %s off after %d consecutive failures (last: %s)",
                self.level,
                failures,
                said,
            )


def _said(error: BaseException) -> str:
    """One line about `error`, whose own text may fail."""
    try:
        return one_line(error)
    except Exception:
        return type(error).__name__
