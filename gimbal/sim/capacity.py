"""How many requests per second a simulated cluster can do: what ``--load`` is a share of.

Capacity is the largest rate at which the backlog stays bounded in steady state (`probes`). It is
searched: a rate that is sustained is doubled, one that is not is halved, and the bracket that this
leaves is bisected. What was found is kept in the user's cache folder under a digest of everything
that it depends on, the simulator's code included.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import gimbal
from gimbal.core.caches import user_cache
from gimbal.core.config_sources import to_mapping
from gimbal.core.errors import InputError
from gimbal.core.files import structured, write_whole
from gimbal.core.json_text import read_object, to_json
from gimbal.core.numbers import real
from gimbal.report.arms import Arm
from gimbal.sim.probes import Bed, Probe, Traffic, settled_probe
from gimbal.workloads import Trace

FORMAT = 2
"""Of a kept capacity; raise it when what is measured changes."""
REQUESTS = 3000
"""Arrivals of the shortest probe."""
MOST_TIMES = 4.0
"""Arrivals of the longest over those of the shortest, where requests stay for so short a time."""
STAYS = 8.0
"""Length of a probe between the two, in P99s of the time that requests stay."""
FEWEST_STAYS = 4.0
"""The same of any: in fewer, a rate that swings looks like a backlog that grows."""
BURST_REQUESTS = 400
BURST_DONE = 0.8
APART = 0.6
"""Of that rate with prefill apart. A burst keeps all prefill engines full, which arrivals do not,
and no decodes slow it down; a search that begins above the capacity takes long."""
PRECISION = 1.05
"""Rates this close are not told apart."""
MOST_PROBES = 16


@dataclass(frozen=True, slots=True)
class Capacity:
    """What was found.

    Attributes:
        rate_rps: the largest rate that was sustained.
        stays: rates that were, ascending, each with the P99 of the seconds that requests stay.
    """

    rate_rps: float
    stays: tuple[tuple[float, float], ...]

    def stay_s(self, rate_rps: float) -> float:
        """How long requests stay, at the nearest rate that is known."""
        return min(self.stays, key=lambda own: abs(math.log(own[0] / rate_rps)))[1]


def find_capacity(
    bed: Bed,
    traffic: Traffic,
    say: Callable[[str], None] = lambda text: None,
    requests: int = REQUESTS,
) -> Capacity:
    """Searches the capacity of `bed` for `traffic`.

    Args:
        requests: arrivals of the shortest probe; more of them find it more exactly.
        say: gets a few words about each probe before it runs.

    Raises InputError where no rate is sustained.
    """
    limit, enough = math.inf, MOST_TIMES * requests
    best: Probe | None = None
    stays = {}
    rate = crude_rate(bed, traffic)
    for _ in range(MOST_PROBES):
        say(f"capacity: {rate:.3g} requests/s?")
        stay_s = 0.0 if best is None else best.residence_s
        count = min(max(STAYS * stay_s * rate, requests), enough)
        span_s = max(count / rate, FEWEST_STAYS * stay_s)
        near = best is not None
        found = settled_probe(
            bed,
            traffic,
            rate,
            span_s,
            near=near,
            stays=STAYS,
            fewest=FEWEST_STAYS,
            enough=enough,
        )
        if found.sustained:
            best, stays[rate] = found, found.residence_s
        else:
            limit = rate
        if best is None:
            rate = limit / 2
        elif math.isinf(limit):
            rate = 2 * best.rate_rps
        elif limit / best.rate_rps <= PRECISION:
            break
        else:
            rate = math.sqrt(limit * best.rate_rps)
    if best is None:
        raise InputError(
            f"arm {bed.arm.name}: no rate above {limit:.3g} requests/s has a bounded backlog"
        )
    return Capacity(best.rate_rps, tuple(sorted(stays.items())))


def crude_rate(bed: Bed, traffic: Traffic) -> float:
    """Four fifths of a burst, by the time they take: the rest may be long answers."""
    trace = traffic(None, BURST_REQUESTS)
    rows = tuple(dataclasses.replace(r, arrival_s=0.0) for r in trace.requests)
    run = bed.simulate(dataclasses.replace(trace, requests=rows)).run()
    ends = sorted(r.last_token_s or 0.0 for r in run.records)
    count = max(1, int(BURST_DONE * len(ends)))
    rate = count / ends[count - 1]
    return rate if bed.cluster.prefill is None else APART * rate


def known_capacity(
    bed: Bed,
    traffic: Traffic,
    source: Trace,
    workload: Any,
    say: Callable[[str], None] = lambda text: None,
) -> Capacity:
    """`find_capacity`, or what it found earlier for the same question.

    Args:
        source, workload: what `traffic` makes requests of: the trace and its options.
    """
    folder = user_cache()
    path = None
    if folder is not None:
        path = folder / "gimbal" / "capacity" / f"{_digest(bed, source, workload)}.json"
        kept = _kept(path)
        if kept is not None:
            return kept
    found = find_capacity(bed, traffic, say)
    if path is not None:
        with contextlib.suppress(OSError):  # a folder that cannot be written costs a search
            write_whole(path, to_json(dataclasses.asdict(found)))
    return found


def _kept(path: Path) -> Capacity | None:
    """What an earlier search has left; None where there is nothing that can be read."""
    with contextlib.suppress(InputError):
        values = read_object(path)
        with structured(path):
            stays = tuple([(_positive(rate), _positive(stay)) for rate, stay in values["stays"]])
            return Capacity(_positive(values["rate_rps"]), stays) if stays else None
    return None


def _positive(value: Any) -> float:
    return real(value, "a kept capacity: ", above=0.0)


def _digest(bed: Bed, source: Trace, workload: Any) -> str:
    """Of everything that a capacity depends on."""
    values = {"code": code_digest(), **capacity_definition(bed, source, workload)}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:32]


def capacity_definition(bed: Bed, source: Trace, workload: Any) -> dict[str, Any]:
    """Everything that a capacity depends on, but for the code."""
    return {
        "format": FORMAT,
        "cluster": dataclasses.asdict(bed.cluster),
        "profile": dataclasses.asdict(bed.profile),
        "routing": hashlib.sha256(bed.population.share.tobytes()).hexdigest(),
        "arm": arm_definition(bed.arm),
        "seed": bed.seed,
        "workload": dataclasses.asdict(workload),
        "block": source.prefix_block_tokens,
        "scenario": repr(source.scenario),
        "rows": rows_digest(source),
    }


def rows_digest(trace: Trace) -> str:
    """Of a trace's requests, all that a simulation reads of them."""
    rows = hashlib.sha256()
    for r in trace.requests:
        row = (r.arrival_s, r.prompt_tokens, r.output_tokens, r.session, r.domain, r.prefix_blocks)
        rows.update(repr(row).encode())
    return rows.hexdigest()


def arm_definition(arm: Arm) -> dict[str, Any]:
    """What of an arm its runs depend on, defaults of the configuration included."""
    values = arm.to_json() | {"config": to_mapping(arm.gimbal_config())}
    del values["description"]
    return values


@lru_cache(maxsize=1)
def code_digest() -> str:
    """Of the modules that run a simulation and judge it: tells results of older code apart."""
    root = Path(gimbal.__file__).parent
    parts = "sim workloads core/dispatch core/queue core/feedback core/placement core/cost"
    digest = hashlib.sha256()
    files = [root / "report" / "window.py"]
    files += [path for part in parts.split() for path in (root / part).rglob("*.py")]
    for path in sorted(files):
        digest.update(path.relative_to(root).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
