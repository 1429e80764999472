"""The simulator against real runs: ``make validate``.

    python benchmarks/validate_simulator.py [--data DIR] [--runs DIR ... --profile FILE]

Without options: the published runs of Qwen3-30B-A3B whose kernel tables the profiles were fitted
to, none of whose requests were. With --runs: directories written by ``gimbal bench --out`` on a
machine whose profile ``gimbal calibrate`` wrote; each arm's requests are replayed in the simulator
and compared, and so is the order of the arms wherever the measured difference is significant.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gimbal.bench.compare import compare
from gimbal.bench.metrics import Slo, samples, summarize
from gimbal.core.cost.profile import load_profile
from gimbal.records.schema import RequestRecord
from gimbal.records.store import RunReader
from gimbal.sim.arms import Arm, get_arm
from gimbal.sim.cluster import Cluster, load_cluster
from gimbal.sim.routing import make_population
from gimbal.sim.run import Simulation
from gimbal.workloads.trace import Trace, TraceRequest, make_trace

RTX_RUN = "llmservingsim_qwen3_30b/bench_vllm_requests.jsonl"
LIVE_ARMS = {
    "vllm": Arm("vllm"),
    "gimbal-queue": Arm("gimbal-queue", ordering="gimbal"),
    "gimbal-dispatch": Arm("gimbal-dispatch", "gimbal", True),
}


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
    run = Simulation(trace, cluster, profile, make_population(profile), arm, concurrency=10).run()
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


def validate_live(directory: Path, profile_path: Path, cluster: Cluster) -> bool:
    """Replays every run of `directory`; targets TPOT 5 %, mean TTFT 15 %."""
    profile = load_profile(profile_path)
    population = make_population(profile)
    info, records = RunReader(directory).info(), RunReader(directory).requests()
    names = [name for name in info.arms if name in LIVE_ARMS]
    real_runs: dict[str, list[list[RequestRecord]]] = {}
    sim_runs: dict[str, list[list[RequestRecord]]] = {}
    for name in names:
        real_runs[name], sim_runs[name] = [], []
        for repeat in sorted({r.repeat for r in records if r.arm == name}):
            run = [r for r in records if r.arm == name and r.repeat == repeat]
            real_runs[name].append(run)
            arm = LIVE_ARMS[name]
            simulated = Simulation(live_trace(run), cluster, profile, population, arm).run()
            sim_runs[name].append(simulated.records)
    good = True
    load = (info.result or {}).get("load")
    for name in names:
        real, got = summarize(real_runs[name], Slo()), summarize(sim_runs[name], Slo())
        header(f"{directory.name}: arm {name}, load {load}")
        for metric, statistic, target in (
            ("ttft_ms", "mean", 0.15),
            ("ttft_ms", "p99", None),
            ("tpot_ms", "mean", 0.05),
        ):
            title = f"{metric[:4].upper()} {statistic}"
            pair = real[metric][statistic], got[metric][statistic]  # type: ignore[index]
            good &= row(title, "ms", *pair, target)
        good &= row("requests/s", "", real["throughput_rps"], got["throughput_rps"], None)  # type: ignore[arg-type]
    return good & _ranking(real_runs, sim_runs)


def _ranking(
    real: dict[str, list[list[RequestRecord]]], simulated: dict[str, list[list[RequestRecord]]]
) -> bool:
    """Whether the simulator orders the arms as measured, where the measurement is significant."""
    if len(real) < 2:
        return True
    base = next(iter(real))
    measured = compare(real, base, Slo(), np.random.default_rng(0))
    predicted = compare(simulated, base, Slo(), np.random.default_rng(0), draws=1)
    right = True
    for name, metrics in measured.items():
        for metric in ("ttft_ms.mean", "ttft_ms.p99", "tpot_ms.mean"):
            interval, ratio = metrics[metric], predicted[name][metric].ratio
            if interval.low <= 1 <= interval.high:
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
    parser.add_argument("--profile", type=Path, help="of the machine that --runs was measured on")
    parser.add_argument("--kv-tokens", type=int, default=100_000)
    args = parser.parse_args()
    good = True
    if (Path(args.data) / RTX_RUN).exists():
        good &= validate_rtx(Path(args.data))
    else:
        print(f"{args.data}: no recorded run there; set GIMBAL_DATA to validate against it")
    validate_h100()
    cluster = Cluster(
        name="cpu-demo",
        profile=str(args.profile or ""),
        dp=2,
        max_num_batched_tokens=512,
        max_num_seqs=256,
        kv_tokens=args.kv_tokens,
    )
    for directory in args.runs:
        good &= validate_live(directory, args.profile, cluster)
    print("\nevery target met" if good else "\ntargets missed: see the lines marked MISS or WRONG")


if __name__ == "__main__":
    main()
