"""Expert placement live: no EPLB, vLLM's EPLB and the level `placement` in turns on the demo model.

    python benchmarks/bench_placement_live.py --tp 1 --repeat 2 --json > dp2.json
    python benchmarks/bench_placement_live.py --tp 2 --repeat 1 --json > dp2tp2.json

Every domain of the demo model is pinned to one of two engines, so that who asks for an expert is
known. Latencies are `gimbal bench`'s. Crossing and balance price the map that an arm has at the
end of its turn on the counts that the level recorded in the same repeat (the same requests on
the same engines), so all arms are measured by one ruler; an arm without EPLB keeps vLLM's first
map. Stalls are vLLM's own log lines ("Rearranged experts in ... s") and the level's records.
Before and after each turn the same prompts are decoded greedily, one at a time and without the
prefix cache.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
import urllib.error
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from gimbal.bench.endpoint import Endpoint
from gimbal.bench.servers import ServerPool
from gimbal.bench.session import BenchOptions, BenchSession
from gimbal.bench.turns import plan_turns
from gimbal.commands.stats import fetch
from gimbal.core.contracts import Topology
from gimbal.core.placement import objective
from gimbal.core.web import open_url
from gimbal.demo.manifest import load_manifest
from gimbal.records.environment import describe_environment
from gimbal.records.schema import RunInfo
from gimbal.records.store import RunWriter
from gimbal.report.arms import Arm
from gimbal.workloads import WorkloadOptions, load_trace
from gimbal.workloads.prompts import read_vocabulary

ENGINES = 2
PROMPTS, PROMPT_TOKENS, OUTPUT_TOKENS = 12, 60, 16
_STALL = re.compile(r"Rearranged experts.* in ([\d.]+) s")


def arms_of(names: list[str], args: argparse.Namespace, records: Path) -> list[Arm]:
    """The arms asked for; EPLB works synchronously with the same window and interval in all."""
    eplb = {"window_size": args.window, "step_interval": args.interval, "use_async": False}
    flags = ("--enable-eplb", "--eplb-config", json.dumps(eplb | {"communicator": "torch_gloo"}))
    placement = {"records": str(records)}
    local = placement | {"backend": "all2all", "beta": args.beta}
    known = {
        "none": Arm("none", config={"levels": []}, flags=("--no-enable-eplb",)),
        "eplb": Arm("eplb", config={"levels": []}, flags=flags),
        "placement": Arm(
            "placement", config={"levels": ["placement"], "placement": placement}, flags=flags
        ),
        "placement-local": Arm(
            "placement-local", config={"levels": ["placement"], "placement": local}, flags=flags
        ),
    }
    return [known[name] for name in names]


def greedy(endpoint: Endpoint, salt: str) -> list[str]:
    """Texts of the fixed prompts, each decoded alone on its domain's engine."""
    model = endpoint.model()
    manifest = load_manifest(Path(model.root))
    rng = np.random.default_rng(7)
    domains = list(manifest.domains)
    texts = []
    for index in range(PROMPTS):
        domain = index % len(domains)
        body = {
            "model": model.name,
            "prompt": manifest.prompt(domains[domain], PROMPT_TOKENS, rng),
            "max_tokens": OUTPUT_TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "cache_salt": salt,
        }
        headers = {
            "Content-Type": "application/json",
            "X-data-parallel-rank": str(domain % ENGINES),
        }
        url = endpoint.url + "/v1/completions"
        with open_url(url, 120, json.dumps(body).encode(), headers) as reply:
            texts.append(json.loads(reply.read())["choices"][0]["text"])
    return texts


def map_of(endpoint: Endpoint) -> np.ndarray | None:
    """[layers, slots] the map in force, None without EPLB."""
    try:
        with open_url(endpoint.url + "/gimbal/routing?map=1", 60) as reply:
            return np.array(json.loads(reply.read())["physical_to_logical"], dtype=np.int32)
    except urllib.error.HTTPError as error:
        if error.code == 409:
            return None
        raise


def stalls_ms(arm: Arm, log: Path, records: Path, since: tuple[int, int]) -> dict[str, Any]:
    """What the turn's rearrangements took and moved; `since` is where log and records were."""
    if "placement" not in arm.levels:
        found = _STALL.findall(log.read_text(errors="replace")[since[0] :])
        return {"rearrangements": len(found), "stalls_ms": [float(s) * 1e3 for s in found]}
    rows = [json.loads(line) for line in _lines(records)[since[1] :]]
    done = [r for r in rows if r["committed"]]
    return {
        "rearrangements": len(done),
        "refused_by_gate": len(rows) - len(done),
        "stalls_ms": [r["stall_us"] / 1e3 for r in done if r["stall_us"] is not None],
        "received_experts": [r["received_experts"] for r in done],
        "predicted_us_per_step": [r["predicted_gain_us_per_step"] for r in done],
        "realized_us_per_step": [r["realized_gain_us_per_step"] for r in done],
    }


def _lines(records: Path) -> list[str]:
    path = records / "rebalances.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def measure(args: argparse.Namespace, folder: Path, say: Any) -> dict[str, Any]:
    """All turns; the report of `gimbal bench` with a section ``placement`` per arm."""
    records = folder / "placement"
    arms = arms_of(args.arms.split(","), args, records)
    trace = load_trace(args.trace)
    workload = WorkloadOptions(
        rate_rps=args.rate, arrivals="gamma", max_prompt=args.max_prompt, max_output=100
    )
    options = BenchOptions(
        trace,
        workload,
        repeats=args.repeat,
        seed=args.seed,
        salt=int(time.time()),
        duration_s=args.duration,
        warm_up=args.warm_up,
        share=False,
        pin_engines=ENGINES,
    )
    info = RunInfo(
        kind="bench",
        command=tuple(sys.argv),
        seed=args.seed,
        repeats=args.repeat,
        trace={"name": args.trace},
        arms={arm.name: arm.to_json() for arm in arms},
        environment=describe_environment(),
        slo={},
    )
    pool = ServerPool(("--demo", "--tensor-parallel-size", str(args.tp)), folder, say=say)
    live: dict[str, list[dict[str, Any]]] = {arm.name: [] for arm in arms}
    with RunWriter(folder / "run", info) as writer:
        session = BenchSession(
            options,
            arms,
            server_of=lambda spec: pool.get(spec).endpoint,
            vocabulary_of=lambda endpoint: read_vocabulary(Path(endpoint.model().root)),
            writer=writer,
            info=info,
            switch=False,
        )
        try:
            for turn in plan_turns(arms, args.repeat, share=False):
                server = pool.get(turn.spec)
                before = greedy(server.endpoint, f"before {turn.repeat}")
                since = server.log.stat().st_size, len(_lines(records))
                session.run(turn)
                after = greedy(server.endpoint, f"after {turn.repeat}")
                row = stalls_ms(turn.arm, server.log, records, since)
                row["greedy_equal"] = sum(a == b for a, b in zip(before, after, strict=True))
                row["texts"], row["map"] = after, map_of(server.endpoint)
                if "placement" in turn.arm.levels:
                    row["recording"] = fetch(server.endpoint.url, 60.0)
                live[turn.arm.name].append(row)
                say(f"{turn.arm.name} #{turn.repeat + 1}: {row['rearrangements']} rearrangements")
        finally:
            pool.close()
        report = session.report()
    for name, rows in live.items():
        report["arms"][name]["placement"] = [
            _priced(row, repeat, live, args.tp) for repeat, row in enumerate(rows)
        ]
    return report | {"tensor_parallel_size": args.tp}


def _priced(row: dict[str, Any], repeat: int, live: dict[str, Any], tp: int) -> dict[str, Any]:
    """A turn's figures, its map priced on what the level counted in the same repeat."""
    shown = {k: v for k, v in row.items() if k not in ("map", "recording", "texts")}
    reference = live.get("none") or next(iter(live.values()))
    shown["greedy_equal_to_first_arm"] = sum(
        a == b for a, b in zip(row["texts"], reference[repeat]["texts"], strict=True)
    )
    recordings = [r[repeat]["recording"] for r in live.values() if "recording" in r[repeat]]
    if not recordings:
        return shown
    counts = recordings[0].counts
    ranks, experts = ENGINES * tp, counts.shape[2]
    placed = row["map"]
    if placed is None:
        placed = np.tile(np.arange(experts, dtype=np.int32), (counts.shape[1], 1))
    topology = Topology(ranks, placed.shape[1] // ranks, tp, ranks)
    shown["balance"] = objective.balance(placed, counts, topology)
    shown["crossing_share"] = 1.0 - objective.local_share(placed, counts, topology)
    return shown


def table(report: dict[str, Any]) -> Table:
    view = Table(title=f"DP=2 TP={report['tensor_parallel_size']}, domains pinned to engines")
    for name in ("arm", "TTFT mean/P99 ms", "TPOT mean/P99 ms", "crossing", "balance"):
        view.add_column(name, justify="left" if name == "arm" else "right")
    for name in ("rearranged", "stall ms (mean/max)", "greedy same"):
        view.add_column(name, justify="right")
    for name, arm in report["arms"].items():
        rows = arm["placement"]
        stalls = [s for row in rows for s in row["stalls_ms"]]
        view.add_row(
            name,
            *(f"{arm[m]['mean']:.1f} / {arm[m]['p99']:.1f}" for m in ("ttft_ms", "tpot_ms")),
            *(
                " ".join(f"{row[k]:.3f}" for row in rows if k in row)
                for k in ("crossing_share", "balance")
            ),
            " ".join(str(row["rearrangements"]) for row in rows),
            f"{np.mean(stalls):.0f} / {max(stalls):.0f}" if stalls else "-",
            " ".join(f"{row['greedy_equal']}/{PROMPTS}" for row in rows),
        )
    return view


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel size; EP is twice that")
    parser.add_argument("--arms", default="none,eplb,placement")
    parser.add_argument("--trace", default="burstgpt")
    parser.add_argument("--rate", type=float, default=20.0, help="requests per second")
    parser.add_argument("--duration", type=float, default=20.0, help="seconds per turn")
    parser.add_argument("--warm-up", type=int, default=32, help="requests before each turn")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--max-prompt", type=int, default=1000)
    parser.add_argument("--window", type=int, default=100, help="EPLB window, steps")
    parser.add_argument("--interval", type=int, default=200, help="EPLB interval, steps")
    parser.add_argument("--beta", type=float, default=20.0, help="of the arm placement-local")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="where records and logs go")
    parser.add_argument("--json", action="store_true", help="print one JSON object as well")
    return parser.parse_args()


def main() -> None:
    """Prints the table, and with --json the report."""
    args = arguments()
    folder = args.out or Path(tempfile.mkdtemp(prefix="gimbal-bench-"))
    folder.mkdir(parents=True, exist_ok=True)
    errors = Console(stderr=True)
    report = measure(args, folder, lambda text: errors.print(text, highlight=False))
    Console(stderr=args.json, width=150).print(table(report))
    if args.json:
        print(json.dumps(report))


if __name__ == "__main__":
    main()
