"""Whether processes that a test started are gone."""

from __future__ import annotations

import time
from pathlib import Path


def gone(pids: list[int], timeout_s: float) -> bool:
    """True once none of `pids` runs; zombies of this container's init count as gone."""
    deadline_s = time.monotonic() + timeout_s
    while any(is_running(pid) for pid in pids):
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.1)
    return True


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
