"""One set of cores per worker on CPU (``VLLM_CPU_OMP_THREADS_BIND``).

vLLM's ``auto`` assigns cores by NUMA node: on one node both engines of DP=2 land on the same
core, and TP=2 is refused.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from pathlib import Path

_CPU_FOLDER = Path("/sys/devices/system/cpu")


def bind_workers(cpus: Sequence[int], engines: int, workers_per_engine: int) -> str:
    """``VLLM_CPU_OMP_THREADS_BIND``: CPU lists of the workers in (engine, worker) order.

    Engines get disjoint, contiguous shares as long as there is a core for each; the workers of
    one engine share its cores when there are fewer. Where every worker keeps two or more cores,
    the first core is left to the front end and the schedulers.

    Args:
        cpus: usable cores, neighbours adjacent.
        engines: data-parallel engines on this machine.
        workers_per_engine: tensor-parallel times pipeline-parallel ranks.
    """
    if len(cpus) > 2 * engines * workers_per_engine:
        cpus = cpus[1:]
    lists = []
    for share in _shares(cpus, engines):
        lists += [",".join(map(str, part)) for part in _shares(share, workers_per_engine)]
    return "|".join(lists)


def _shares(items: Sequence[int], parts: int) -> list[Sequence[int]]:
    if len(items) < parts:
        return [[items[i * len(items) // parts]] for i in range(parts)]
    bounds = [i * len(items) // parts for i in range(parts + 1)]
    return [items[a:b] for a, b in itertools.pairwise(bounds)]


def usable_cores() -> list[int]:
    """One CPU per physical core of those this process may run on, grouped by NUMA node."""
    chosen: dict[tuple[int, str], int] = {}
    for cpu in sorted(os.sched_getaffinity(0)):
        folder = _CPU_FOLDER / f"cpu{cpu}"
        node = min((int(p.name[4:]) for p in folder.glob("node[0-9]*")), default=0)
        siblings = folder / "topology" / "thread_siblings_list"
        core = siblings.read_text().strip() if siblings.exists() else str(cpu)
        chosen[node, core] = cpu
    return [cpu for (_, _), cpu in sorted(chosen.items(), key=lambda kv: (kv[0][0], kv[1]))]
