"""The simulator against real runs: ``make validate``.

    python benchmarks/validate_simulator.py [--data DIR] [--runs DIR ...] [--profile FILE]

Without options: the published runs of Qwen3-30B-A3B whose kernel tables the profiles were fitted
to, none of whose requests were. With --runs: directories written by ``gimbal bench --out`` on a
machine whose profile ``gimbal calibrate`` wrote; each arm's requests are replayed in the simulator
and compared in the run's window, and so is the order of the arms wherever the measured difference
is significant.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gimbal.core.cost.profile import Profile, load_profile, slowed
from gimbal.records.schema import RequestRecord
from gimbal.records.store import RunReader
from gimbal.report.arms import Arm, get_arm
from gimbal.report.arms_file import parse_arm
from gimbal.report.compare import compare
from gimbal.report.metrics import Slo, samples, summarize
from gimbal.report.window import Window, window_of
from gimbal.sim.cells import gaps_ms
from gimbal.sim.cluster import Cluster, load_cluster
from gimbal.sim.routing import make_population, named_population
from gimbal.sim.run import Simulation
from gimbal.workloads.trace import Trace, TraceRequest, make_trace

RTX_RUN = "llmservingsim_qwen3_30b/bench_vllm_requests.jsonl"


SPEED_ROUNDS = 4


def row(name: str, unit: str, real: float, predicted: float, target: float | None) -> bool:
    """Prints one comparison; True unless it misses its target."""
    error = predicted / real - 1
    verdict = "" if target is None else ("ok" if abs(error) <= target else "MISS")
    limit = "" if target is None else f"{target:6.1%}"
    print(
        f"  {name:24s} {real:10.2f} {predicted:10.2f} {unit:4s} {error:+7.1%} {limit:>7s} {verdict}"
    )
    return verdict != "MISS"


def header(title: str) -> None:
    columns = f"{'':24s} {'real':>10s} {'predicted':>10s} {'':4s} {'error':>7s} {'target':>7s}"
    print(f"\n{title}\n  {columns}")


def validate_rtx(data: Path) -> bool:
    """vLLM 0.19, DP=2 EP=2 on two RTX PRO 6000, 300 ShareGPT requests at 10.3 per second."""
    real = [json.loads(line) for line in (data / RTX_RUN).read_text().splitlines()]
    start = real[0]["arrival_time"]
    trace = make_trace(
        "llmservingsim",
        [TraceRequest(r["arrival_time"] - start, r["input_toks"], r["output_toks"]) for r in real],
    )
    cluster, profile = load_cluster("rtxpro6000x2")
    # The run's TTFT counts from the engine's queue: the front end is not part of it.
    profile = dataclasses.replace(profile, api_us=0.0, api_token_us=0.0)
    arm = get_arm("vllm-legacy-no-eplb")  # vLLM 0.19 has the older formula
    result = Simulation(trace, cluster, profile, make_population(profile), arm).run()
    first = np.array([r.first_token_s for r in result.records])
    tokens = np.array([r.output_tokens for r in result.records])
    last = np.array([r.last_token_s for r in result.records])
    got_ttft = (first - result.queued_s) * 1e3
    got_tpot = (last - first) / (tokens - 1) * 1e3
    real_ttft = np.array([r["first_token_ts"] - r["queued_ts"] for r in real]) * 1e3
    spans = np.array([r["last_token_ts"] - r["first_token_ts"] for r in real])
    real_tpot = spans / (tokens - 1) * 1e3
    header("Qwen3-30B-A3B, 2x RTX PRO 6000, DP=2 EP=2, vLLM 0.19 (LLMServingSim's own run)")
    p99 = lambda x: float(np.percentile(x, 99))  # noqa: E731
    return all(
        [
            row("TTFT mean", "ms", real_ttft.mean(), got_ttft.mean(), 0.13),
            row("TTFT P50", "ms", np.median(real_ttft), np.median(got_ttft), None),
            row("TTFT P99", "ms", p99(real_ttft), p99(got_ttft), 0.10),
            row("TPOT mean", "ms", real_tpot.mean(), got_tpot.mean(), 0.017),
            row("TPOT P99", "ms", p99(real_tpot), p99(got_tpot), None),
        ]
    )


def validate_h100() -> None:
    """The published point of vLLM PR 23151: one H100, 2048/1024 tokens, concurrency 10."""
    cluster, profile = load_cluster("h100x1-tp1")
    trace = make_trace("random", [TraceRequest(0.0, 2048, 1024) for _ in range(100)])
    arm = get_arm("round-robin")
    # Random token ids are one domain: nothing in them differs from request to request.
    population = named_population("one-domain", profile)
    run = Simulation(trace, cluster, profile, population, arm, concurrency=10).run()
    got = samples(run.records)
    header("Qwen3-30B-A3B, 1x H100, TP1, vLLM of August 2025 (vLLM PR 23151), no target set")
    row("TTFT mean", "ms", 267.0, got.ttft_ms.mean(), None)
    row("TTFT P99", "ms", 455.0, float(np.percentile(got.ttft_ms, 99)), None)
    row("TPOT mean", "ms", 13.18, got.tpot_ms.mean(), None)
    row("requests/s", "", 0.73, 100 / run.duration_s, None)


def live_trace(records: Sequence[RequestRecord]) -> Trace:
    """The requests of one measured run, as they arrived."""
    rows = [
        TraceRequest(r.arrival_s, r.prompt_tokens, max(r.output_tokens, 1), r.session, r.domain)
        for r in sorted(records, key=lambda r: r.index)
    ]
    return make_trace("live", rows)


def live_arm(name: str, spec: Mapping[str, Any]) -> Arm:
    """Dispatch and queue of a measured arm, from what ``run.json`` says of it; experts stay."""
    arm = parse_arm(f"arm {name}", name, spec)
    levels = [level for level in arm.levels if level in ("dispatch", "queue")]
    config = {**arm.config, "levels": levels}
    return dataclasses.replace(arm, config=config, flags=("--no-enable-eplb",))


def mean_gap_ms(records: Sequence[RequestRecord]) -> float:
    """Mean time between two tokens of a request."""
    gaps = np.concatenate([np.diff(r.token_times_s) for r in records])
    return float(gaps.mean()) * 1e3


@dataclass(frozen=True)
class Replay:
    """One measured run and its predictions.

    Attributes:
        predicted: at the calibrated speed.
        paced: with every time scaled so that the mean gap between tokens is the measured one.
        slowness: that scale: how much slower the run's steps were than predicted.
    """

    measured: list[RequestRecord]
    predicted: list[RequestRecord]
    paced: list[RequestRecord]
    slowness: float


def replay(run: list[RequestRecord], arm: Arm, cluster: Cluster, profile: Profile) -> Replay:
    """Simulates a measured run as calibrated, and again with the step time it turned out to have.

    The second tells an error of the step time, or a machine whose speed has changed since it was
    calibrated, from an error of the engine model: its TTFT is a prediction, and of its TPOT only
    how it differs among requests.
    """
    population = named_population(cluster.routing, profile)
    trace = live_trace(run)
    first = result = Simulation(trace, cluster, profile, population, arm).run()
    slowness = 1.0
    for _ in range(SPEED_ROUNDS):
        gap_ms = gaps_ms(result.step_us, result.step_decodes)["mean"]
        assert gap_ms is not None
        slowness *= mean_gap_ms(run) / gap_ms
        result = Simulation(trace, cluster, slowed(profile, slowness), population, arm).run()
    return Replay(run, first.records, result.records, slowness)


def validate_live(directory: Path, cluster: Cluster, profile: Profile) -> bool:
    """Replays every run of `directory`; targets TPOT 5 %, mean TTFT 15 %.

    A run in steady state is replayed whole, and compared in its window.
    """
    info, records = RunReader(directory).info(), RunReader(directory).requests()
    replays: dict[str, list[Replay]] = {}
    for name, spec in info.arms.items():
        runs = [
            [r for r in records if r.arm == name and r.repeat == repeat and r.status == "ok"]
            for repeat in sorted({r.repeat for r in records if r.arm == name})
        ]
        replays[name] = [replay(run, live_arm(name, spec), cluster, profile) for run in runs]
    good = True
    result = info.result or {}
    load, window = result.get("load"), window_of(result)
    part = "whole turns" if window is None else f"{window.begin_s:.0f} to {window.end_s:.0f} s"
    for name, done in replays.items():
        slow = ", ".join(f"{r.slowness:.2f}" for r in done)
        header(f"{directory.name}: arm {name}, load {load}, {part}; steps slower by {slow}")
        real = summarize([r.measured for r in done], Slo(), window)
        got = summarize([r.predicted for r in done], Slo(), window)
        paced = summarize([r.paced for r in done], Slo(), window)
        good &= _compare(real, got, "ttft_ms", "mean", 0.15)
        _compare(real, paced, "ttft_ms", "mean", None, ", measured step")
        _compare(real, got, "ttft_ms", "p50", None)
        _compare(real, got, "ttft_ms", "p99", None)
        good &= _compare(real, got, "tpot_ms", "mean", 0.05)
        _compare(real, paced, "tpot_ms", "mean", None, ", measured step")
        _compare(real, got, "tpot_ms", "p99", None)
        row("requests/s", "", real["throughput_rps"], got["throughput_rps"], None)
    measured = {name: [r.measured for r in done] for name, done in replays.items()}
    predicted = {name: [r.predicted for r in done] for name, done in replays.items()}
    return good & _ranking(measured, predicted, window)


def _compare(
    real: Mapping[str, Any],
    got: Mapping[str, Any],
    metric: str,
    statistic: str,
    target: float | None,
    note: str = "",
) -> bool:
    title = f"{metric[:4].upper()} {statistic}{note}"
    return row(title, "ms", real[metric][statistic], got[metric][statistic], target)


def _ranking(
    real: dict[str, list[list[RequestRecord]]],
    simulated: dict[str, list[list[RequestRecord]]],
    window: Window | None,
) -> bool:
    """Whether the simulator orders the arms as measured, where the measurement is significant."""
    if len(real) < 2:
        return True
    base = next(iter(real))
    measured = compare(real, base, Slo(), window)
    predicted = compare(simulated, base, Slo(), window)
    right = True
    for name, metrics in measured.items():
        for metric in ("ttft_ms.mean", "ttft_ms.p99", "tpot_ms.mean"):
            interval, ratio = metrics[metric], predicted[name][metric].ratio
            if not interval.differs:
                continue
            same = (interval.ratio < 1) == (ratio < 1)
            right &= same
            print(
                f"  {name}/{base} {metric}: measured {interval.ratio:.2f} "
                f"[{interval.low:.2f}, {interval.high:.2f}], predicted {ratio:.2f} "
                f"{'ok' if same else 'WRONG ORDER'}"
            )
    return right


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default=os.environ.get("GIMBAL_DATA", "../shared/data"))
    parser.add_argument("--runs", nargs="*", type=Path, default=[])
    parser.add_argument(
        "--profile", type=Path, help="of the machine of --runs (default: the packaged cpu-demo)"
    )
    args = parser.parse_args()
    good = True
    if (Path(args.data) / RTX_RUN).exists():
        good &= validate_rtx(Path(args.data))
    else:
        print(f"{args.data}: no recorded run there; set GIMBAL_DATA to validate against it")
    validate_h100()
    cluster, profile = load_cluster("cpu-demo")
    if args.profile is not None:
        profile = load_profile(args.profile)
    for directory in args.runs:
        good &= validate_live(directory, cluster, profile)
    print("\nevery target met" if good else "\ntargets missed: see the lines marked MISS or WRONG")


if __name__ == "__main__":
    main()
