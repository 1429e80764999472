"""What the queue level costs vLLM's scheduler per step, without a model.

    python benchmarks/bench_scheduler_step.py [--waiting 1000] [--running 64]

A real ``AsyncScheduler`` with `running` decodes and `waiting` requests. Steady: no seat is free, so
nothing is admitted, and a step is what the queue costs by merely being there. Churn: every step one
request ends, one is admitted and one arrives. The arms take turns, step by step, and the median
of many steps is reported, each also relative to vLLM with FCFS. Mean: of both, in the proportion
in which they occur when a request decodes `--output-tokens` tokens.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "vllm_plugin"))

ARMS: dict[str, dict[str, Any] | None] = {
    "vllm": None,
    "signals only": {"levels": ["dispatch"]},
    "queue, fcfs": {"levels": ["queue"], "queue": {"ordering": "fcfs"}},
    "queue, gimbal": {"levels": ["queue"]},
    "queue, hrrn": {"levels": ["queue"], "queue": {"ordering": "hrrn"}},
}


class Arm:
    """One scheduler with its requests."""

    def __init__(self, gimbal: dict[str, Any] | None, waiting: int, running: int) -> None:
        import real_scheduler as real

        self.real = real
        self.rng = random.Random(3)
        folder = Path(tempfile.mkdtemp())
        blocks = 64 * (waiting + running)
        self.scheduler = real.build(folder, gimbal, blocks=blocks, seats=running, budget=8192)
        self.count = 0
        for _ in range(running):
            self.add(16)
        for _ in range(4):
            self.step()
        assert len(self.scheduler.running) == running
        for _ in range(waiting):
            self.add()

    def add(self, tokens: int | None = None) -> None:
        tokens = self.rng.randint(16, 900) if tokens is None else tokens
        name = f"r{self.count}"
        self.scheduler.add_request(self.real.request(name, tokens, 7000, arrival=self.count))
        self.count += 1

    def churn(self) -> None:
        from vllm.v1.request import RequestStatus

        name = self.scheduler.running[0].request_id
        self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)
        self.add()

    def step(self) -> float:
        started = time.perf_counter()
        output = self.scheduler.schedule()
        elapsed = time.perf_counter() - started
        self.real.finish_step(self.scheduler, output)
        return elapsed * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--waiting", type=int, default=1000)
    parser.add_argument("--running", type=int, default=64)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--output-tokens", type=float, default=200.0)
    options = parser.parse_args()
    arms = {name: Arm(gimbal, options.waiting, options.running) for name, gimbal in ARMS.items()}
    gc.collect()
    gc.freeze()
    medians: dict[str, dict[str, float]] = {}
    for scene in ("steady", "churn"):
        times: dict[str, list[float]] = {name: [] for name in arms}
        for _ in range(options.steps):
            for name, arm in arms.items():
                if scene == "churn":
                    arm.churn()
                times[name].append(arm.step())
        medians[scene] = {name: statistics.median(values) for name, values in times.items()}
    admitting = min(1.0, options.running / options.output_tokens)
    medians[f"mean, {admitting:.0%} of steps admit"] = {
        name: (1 - admitting) * medians["steady"][name] + admitting * medians["churn"][name]
        for name in arms
    }
    for scene, values in medians.items():
        print(f"{scene}: {options.waiting} waiting, {options.running} running")
        for name, median in values.items():
            relative = median / values["vllm"]
            print(f"  {name:16}{median:9.1f} us per schedule() {relative:7.3f}")


if __name__ == "__main__":
    main()
