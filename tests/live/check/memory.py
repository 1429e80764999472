"""Is a process's memory flat? Samples of every process of a server, and the judgement. Pure but
for `sample`.

What counts is resident memory that is not shared: pages of files in shared memory become resident
when they are first used, and are bounded by the files.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

MIB = 2**20
TOLERATED_SHARE = 0.01
"""Of the process's memory: what it may grow by over the second half."""
TOLERATED_BYTES = 2 * MIB
"""At least so much: an allocator takes memory from the system in pieces of this size."""
LEAST_SAMPLES = 20
MOST_SAMPLES = 150
"""Of a half: the median slope looks at every pair of them."""

Samples = Sequence[tuple[float, int]]


@dataclass(frozen=True, slots=True)
class ProcessMemory:
    """The second half of one process, in bytes.

    Attributes:
        before, after: medians of the first and last fifth.
        growth: slope times duration.
        flat: whether the growth is tolerated. Less memory than before is flat.
    """

    name: str
    before: float
    after: float
    slope_per_s: float
    growth: float
    tolerated: float

    @property
    def flat(self) -> bool:
        return self.growth <= self.tolerated


def slope_per_s(samples: Samples) -> float:
    """Median of the slopes between all pairs of samples (Theil and Sen): outliers do not matter."""
    step = max(1, len(samples) // MOST_SAMPLES)
    kept = samples[::step]
    return statistics.median(
        (y - x) / (t - s) for i, (s, x) in enumerate(kept) for t, y in kept[i + 1 :] if t > s
    )


def judge(name: str, samples: Samples) -> ProcessMemory | None:
    """The second half of a process; None when it has too few samples to say anything.

    Args:
        samples: (seconds, bytes) in order of time.
    """
    if len(samples) < 2 * LEAST_SAMPLES:
        return None
    middle_s = (samples[0][0] + samples[-1][0]) / 2
    half = [(at, value) for at, value in samples if at >= middle_s]
    fifth = max(1, len(half) // 5)
    slope = slope_per_s(half)
    before = statistics.median(value for _, value in half[:fifth])
    after = statistics.median(value for _, value in half[-fifth:])
    return ProcessMemory(
        name,
        before=before,
        after=after,
        slope_per_s=slope,
        growth=slope * (half[-1][0] - half[0][0]),
        tolerated=max(TOLERATED_BYTES, TOLERATED_SHARE * before),
    )


def judge_all(processes: Mapping[str, Samples], ended_s: float) -> list[ProcessMemory]:
    """Every process that was still there at `ended_s`; those that had ended by then have no end."""
    found = []
    for name, samples in sorted(processes.items()):
        lived = bool(samples) and ended_s - samples[-1][0] < 30.0
        judged = judge(name, samples) if lived else None
        if judged is not None:
            found.append(judged)
    return found


def render(rows: Sequence[ProcessMemory]) -> Table:
    """The rows as people read them."""
    table = Table(title="memory over the second half (shared memory left out)")
    table.add_column("process")
    for name in ("at half, MiB", "at end, MiB", "KiB/min", "growth, MiB", "tolerated, MiB", ""):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row.name,
            f"{row.before / MIB:.1f}",
            f"{row.after / MIB:.1f}",
            f"{row.slope_per_s * 60 / 1024:+.0f}",
            f"{row.growth / MIB:+.2f}",
            f"{row.tolerated / MIB:.1f}",
            "flat" if row.flat else "GROWS",
        )
    return table


def unshared_bytes(status: str) -> int:
    """Resident memory that is not shared, from the text of ``/proc/PID/status``."""
    kib = 0
    for line in status.splitlines():
        if line.startswith(("RssAnon:", "RssFile:")):
            kib += int(line.split()[1])
    return kib * 1024


def sample(pids: Sequence[int]) -> dict[str, int]:
    """Name and bytes of each of `pids` that runs."""
    found = {}
    for pid in pids:
        folder = Path("/proc") / str(pid)
        try:
            words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
            value = unshared_bytes((folder / "status").read_text())
        except OSError:
            continue
        if value:
            found[f"{_title(words)} ({pid})"] = value
    return found


def _title(words: Sequence[str]) -> str:
    """What a command line is about: vLLM's own title, the module, or the program."""
    if words[0].startswith("VLLM::"):
        return words[0]
    if "-m" in words[:-1]:
        return words[words.index("-m") + 1]
    return Path(words[0]).name
