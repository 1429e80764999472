"""Speed and memory of the simulator: ``make bench-sim``.

Prints lock-step iterations per second on one core (48 layers, 128 experts, the paper's layout)
and the peak memory of a run of 100,000 requests.
"""

from __future__ import annotations

import argparse
import resource
import time
from dataclasses import replace

from gimbal.report.arms import get_arm
from gimbal.sim.cluster import load_cluster
from gimbal.sim.routing import make_population
from gimbal.sim.run import Simulation
from gimbal.workloads import WorkloadOptions, build_workload
from gimbal.workloads.trace import Trace, TraceRequest, make_trace

RATES_RPS = (12.0, 24.0, 48.0)
ARMS = [  # experts stay, as they did when these were first measured
    replace(get_arm(name), flags=("--no-enable-eplb",)) for name in ("vllm-no-eplb", "gimbal-dp")
]


def synthetic(requests: int) -> Trace:
    """Lengths that need no data set: prompts 1 to 4,000 tokens, outputs 1 to 300."""
    rows = [
        TraceRequest(float(i), 1 + (i * 7919) % 997 + (3000 if i % 41 == 0 else 0), 1 + i % 300)
        for i in range(requests)
    ]
    return make_trace("synthetic", rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=4000)
    parser.add_argument("--memory-requests", type=int, default=100_000)
    args = parser.parse_args()
    cluster, profile = load_cluster("h100x4-paper")
    population = make_population(profile)
    warm = build_workload(synthetic(50), WorkloadOptions(arrivals="poisson", rate_rps=10.0), 0)
    for arm in ARMS:  # compiles the kernels
        Simulation(warm, cluster, profile, population, arm).run()
    print(f"{'arm':>14s} {'rate/s':>7s} {'steps':>8s} {'steps/s':>9s} {'x real time':>11s}")
    for rate in RATES_RPS:
        options = WorkloadOptions(arrivals="poisson", rate_rps=rate)
        trace = build_workload(synthetic(args.requests), options, 0)
        for arm in ARMS:
            simulation = Simulation(trace, cluster, profile, population, arm)
            began = time.perf_counter()
            result = simulation.run()
            took = time.perf_counter() - began
            print(
                f"{arm.name:>14s} {rate:7.0f} {result.steps:8d} {result.steps / took:9.0f} "
                f"{result.duration_s / took:11.0f}"
            )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    options = WorkloadOptions(arrivals="poisson", rate_rps=RATES_RPS[-1])
    trace = build_workload(synthetic(args.memory_requests), options, 0)
    result = Simulation(trace, cluster, profile, population, ARMS[-1]).run()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(
        f"{len(result.records)} requests: peak {peak / 2**20:.2f} GiB "
        f"({(peak - before) / 2**20:.2f} GiB above the start)"
    )


if __name__ == "__main__":
    main()
