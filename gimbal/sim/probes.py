"""Runs that find out how long requests stay, and whether a rate can be sustained at all.

A probe begins with empty engines and ends at a set time, whatever is open. It has settled when 99
of 100 requests of its second quarter stay no longer than half of it: then its second half is what
a run of any length would look like, unless its backlog grows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from gimbal.core.cost.profile import Profile
from gimbal.report.arms import Arm
from gimbal.report.window import Backlog, Window, backlog_of, residence_s
from gimbal.sim.cluster import Cluster
from gimbal.sim.routing import Population
from gimbal.sim.run import Simulation
from gimbal.workloads import Trace
from gimbal.workloads.transform import repeated, set_rate

Traffic = Callable[[float | None, int], Trace]
"""Requests at a rate, None being the workload's own, and how many."""

LEAST_REQUESTS = 400
"""Arrivals of a probe that asks how long requests stay."""
MOST_ARRIVALS = 100_000
"""Of a probe: one that has not settled by then never does."""
LEAST_STAYS = 2.0
"""Length of a probe that has settled, in P99s of the time that requests stay."""
OVERLOADED = 0.2
DOUBLINGS = 2


@dataclass(frozen=True, slots=True)
class Bed:
    """What runs: everything of a simulation but its requests."""

    cluster: Cluster
    profile: Profile
    population: Population
    arm: Arm
    seed: int = 0

    def simulate(self, trace: Trace) -> Simulation:
        """A simulation of `trace`, not yet run."""
        return Simulation(trace, self.cluster, self.profile, self.population, self.arm, self.seed)


@dataclass(frozen=True, slots=True)
class Probe:
    """What a probe found.

    Attributes:
        rate_rps: of arrivals.
        span_s: its length.
        backlog: over its second half.
        residence_s: seconds from arrival to end, P99; infinite where that is not known.
    """

    rate_rps: float
    span_s: float
    backlog: Backlog
    residence_s: float

    @property
    def settled(self) -> bool:
        """Whether it was long enough."""
        return LEAST_STAYS * self.residence_s <= self.span_s

    @property
    def sustained(self) -> bool:
        """Whether the rate can go on for ever."""
        return self.settled and self.backlog.bounded


def replayed(trace: Trace) -> Traffic:
    """The trace's own requests, over again where it has too few."""

    def traffic(rate_rps: float | None, count: int) -> Trace:
        made = repeated(trace, count)
        return made if rate_rps is None else set_rate(made, rate_rps)

    return traffic


def probe(bed: Bed, traffic: Traffic, rate_rps: float, span_s: float, own: bool = False) -> Probe:
    """Runs `span_s` of arrivals at `rate_rps`; with `own` that is the workload's own rate."""
    trace = traffic(None if own else rate_rps, math.ceil(rate_rps * span_s) + 1)
    records = bed.simulate(trace).run(until_s=span_s).records
    early = Window(span_s / 4, span_s / 2).arrived(records)
    ends = [math.inf if r.last_token_s is None else r.last_token_s - r.sent_s for r in early]
    backlog = backlog_of([records], Window(span_s / 2, span_s))
    return Probe(rate_rps, span_s, backlog, residence_s(np.array(ends)))


def settled_probe(
    bed: Bed,
    traffic: Traffic,
    rate_rps: float,
    span_s: float,
    own: bool = False,
    near: bool = False,
    stays: float = LEAST_STAYS,
    fewest: float = LEAST_STAYS,
    enough: float = 0.0,
) -> Probe:
    """A probe of `span_s`, or of twice, four times, ... that, until it has settled.

    Args:
        own: `rate_rps` is the workload's own.
        near: `span_s` would be enough at half the rate. Then one that piles up `OVERLOADED` of
            what arrives is no ramp, and more than `DOUBLINGS` are in vain.
        stays: its wished length, in P99s of the time that requests stay.
        fewest, enough: with so many arrivals this shorter length will do.

    One that does not settle within `MOST_ARRIVALS` is returned as it is.
    """
    for doubling in itertools.count():
        found = probe(bed, traffic, rate_rps, span_s, own)
        hopeless = found.backlog.growth > OVERLOADED or doubling == DOUBLINGS
        twice = 2 * span_s * rate_rps
        wanted = fewest if twice > enough else stays
        long = found.residence_s * wanted <= span_s
        if long or (near and hopeless) or twice > MOST_ARRIVALS:
            break
        span_s *= 2
    return found


def stay_s(bed: Bed, traffic: Traffic, rate_rps: float, own: bool = False) -> float:
    """P99 of the seconds that requests stay at `rate_rps`; of an overload, half of the probe."""
    found = settled_probe(bed, traffic, rate_rps, LEAST_REQUESTS / rate_rps, own=own)
    return found.residence_s if found.settled else found.span_s / 2
