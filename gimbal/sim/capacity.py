"""How many requests per second a simulated cluster can do: what ``--load`` is a share of.

The same measure as on live servers: the workload arrives at twice a crude rate, and capacity is
what completes per second in the last 70 % of that time, when the queue is never empty.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from gimbal.core.cost.profile import Profile
from gimbal.report.arms import Arm
from gimbal.sim.cluster import Cluster
from gimbal.sim.routing import Population
from gimbal.sim.run import Simulation
from gimbal.workloads import Trace

OVERLOAD = 2.0
STEADY_FROM = 0.3
REQUESTS = 4000


def capacity_rps(
    trace: Trace,
    cluster: Cluster,
    profile: Profile,
    population: Population,
    arm: Arm,
    seed: int,
    requests: int = REQUESTS,
) -> float:
    """Requests per second that `arm` completes of `trace` when it is overloaded."""
    rows = trace.requests
    rows = tuple(rows[i % len(rows)] for i in range(requests))

    def ends_s(rate: float) -> np.ndarray:
        timed = tuple(replace(r, arrival_s=i / rate) for i, r in enumerate(rows))
        overload = replace(trace, requests=timed)
        run = Simulation(overload, cluster, profile, population, arm, seed).run()
        return np.array([r.last_token_s for r in run.records])

    crude = requests / ends_s(np.inf).max()
    rate = OVERLOAD * crude
    ends, span_s = ends_s(rate), requests / rate
    begin = STEADY_FROM * span_s
    return float(((ends > begin) & (ends <= span_s)).sum() / (span_s - begin))
