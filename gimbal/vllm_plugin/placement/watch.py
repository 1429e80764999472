"""Notices a dead or stuck asynchronous EPLB worker (vLLM #57883).

vLLM's worker is a daemon thread whose failure nobody sees: serving goes on, the steps until the
next rearrangement run negative, and no expert ever moves again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

STUCK_AFTER_S = 120.0
"""A rearrangement that commits no layer for this long is stuck. One layer takes milliseconds to
a second; a slow step of a loaded server takes seconds."""


@dataclass(slots=True)
class WorkerWatch:
    """Remembers the worker's progress; every trouble is reported once until it ends."""

    _progress: int = -1
    _since_s: float = 0.0
    _known: set[str] = field(default_factory=set)

    def look(self, thread: Any, busy: bool, progress: int, now_s: float) -> list[str]:
        """Troubles that are new: "dead", "stuck" or none.

        Args:
            thread: vLLM's worker thread, None before it is started.
            busy: a rearrangement is under way.
            progress: layers committed since the server started.
            now_s: monotonic seconds.
        """
        if progress != self._progress or not busy:
            self._progress, self._since_s = progress, now_s
        troubles = set()
        if thread is not None and not thread.is_alive():
            troubles.add("dead")
        elif busy and now_s - self._since_s > STUCK_AFTER_S:
            troubles.add("stuck")
        new = sorted(troubles - self._known)
        self._known = troubles
        return new
