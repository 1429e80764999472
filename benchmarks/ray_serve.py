"""Ray Serve before vLLM engines: Gimbal's router and Ray's own in turns, then a replica killed.

    .venv/bin/pip install '.[ray]'
    python -m benchmarks.ray_serve DIR
    python -m benchmarks.ray_serve DIR --report

Each arm is a deployment of `examples/ray_serve` with two replicas, one engine of the demo model
each: the first of both arms on one core, the second on the other. Only one arm has requests at a
time; an engine without any takes no steps. Both get the same conversations in a turn: prompts grow
by turns and share system prompts. A replica is killed with SIGKILL, its engine too, in the middle
of a run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from benchmarks.routers import table
from gimbal.records.environment import describe_environment
from gimbal.records.schema import RequestRecord, RunInfo
from gimbal.records.store import RunWriter
from gimbal.report.compare import turns
from gimbal.workloads import WorkloadOptions, build_workload, load_trace
from gimbal.workloads.prompts import PromptWriter, Vocabulary, read_vocabulary
from gimbal.workloads.trace import Trace

ROOT = Path(__file__).resolve().parents[1]
ARMS = ("ray", "gimbal")
"""Ray's own router takes the shorter queue of two replicas at random."""
BASE, REPLICAS = "ray", 2
SCALE = 0.4
"""Of the lengths of `chat`."""
FLAGS = {
    "max_model_len": 8192,
    "max_num_batched_tokens": 512,
    "enforce_eager": True,
    "seed": 0,
}


def pinned_engine() -> Any:
    """A replica with a core of its own among those of its arm, that says which process serves."""
    from examples.ray_serve.engines import Engine

    class PinnedEngine(Engine):
        def __init__(self, model: str, flags: dict[str, Any]) -> None:
            cores = sorted(os.sched_getaffinity(0))
            core = cores[_place(Path(flags.pop("places"))) % len(cores)]
            os.sched_setaffinity(0, {core})
            os.environ["VLLM_CPU_OMP_THREADS_BIND"] = str(core)
            os.environ["VLLM_CPU_SIM_MULTI_NUMA"] = "0"
            super().__init__(model, flags)

        async def __call__(self, request: dict[str, Any]) -> Any:
            async for part in super().__call__(request):
                yield part | {"pid": os.getpid()}

    return PinnedEngine


def _place(folder: Path) -> int:
    """The first place in `folder` that nobody has."""
    for place in range(64):
        try:
            (folder / str(place)).touch(exist_ok=False)
        except FileExistsError:
            continue
        return place
    raise RuntimeError("no place is left")


class Bed:
    """Both deployments, and what is sent to them."""

    def __init__(self, folder: Path, kv_bytes: int) -> None:
        from ray import serve
        from ray.serve.config import RequestRouterConfig

        from examples.ray_serve.engines import GIMBAL, engines
        from gimbal.vllm_plugin.serve.plan import demo_model

        routers = {"ray": RequestRouterConfig(), "gimbal": GIMBAL}
        self.model = demo_model()
        self.vocabulary: Vocabulary = read_vocabulary(self.model)
        self.handles: dict[str, Any] = {}
        for name in ARMS:
            places = folder / f"places-{name}-{time.time_ns()}"
            places.mkdir()
            flags = FLAGS | {"kv_cache_memory_bytes": kv_bytes, "places": str(places)}
            served = engines(
                str(self.model), flags, REPLICAS, routers[name], pinned_engine(), name=name,
                ray_actor_options={"num_cpus": 0},
            )  # fmt: skip
            logs = {"log_level": "ERROR"}
            handle = serve.run(served, name=name, route_prefix=None, logging_config=logs)
            self.handles[name] = handle.options(stream=True)

    def trace(self, seed: int, rate_rps: float, requests: int) -> Trace:
        """Conversations, scaled down to what two cores serve."""
        options = WorkloadOptions(
            rate_rps=rate_rps, requests=requests, scale_length=SCALE, max_total=4096
        )
        return build_workload(load_trace("chat"), options, seed, self.vocabulary.names)

    async def replay(self, trace: Trace, arm: str, salt: tuple[int, ...]) -> list[dict[str, Any]]:
        """What became of each request of `trace`."""
        writer = PromptWriter(trace, self.vocabulary, salt)
        prompts = [writer.prompt(i) for i in range(len(trace.requests))]
        start_s = time.perf_counter()

        async def one(index: int) -> dict[str, Any]:
            request = trace.requests[index]
            await asyncio.sleep(start_s + request.arrival_s - time.perf_counter())
            body = {
                "prompt_token_ids": prompts[index],
                "max_tokens": request.output_tokens,
                "temperature": 0.0,
                "ignore_eos": True,
                "session_id": request.session,
            }
            found: dict[str, Any] = {"sent_s": time.perf_counter() - start_s, "times_s": []}
            try:
                async for part in self.handles[arm].remote(body):
                    now_s = time.perf_counter() - start_s
                    found["times_s"] += [now_s] * len(part["token_ids"])
                    found |= {"cached": part["cached"], "pid": part["pid"]}
            except Exception as error:
                found["error"] = type(error).__name__
            found["ended_s"] = time.perf_counter() - start_s
            return found

        return await asyncio.gather(*(one(i) for i in range(len(trace.requests))))


def records(
    found: list[dict[str, Any]], trace: Trace, arm: str, repeat: int
) -> list[RequestRecord]:
    """What the client saw."""
    made = []
    for index, (request, one) in enumerate(zip(trace.requests, found, strict=True)):
        times = one["times_s"]
        made.append(
            RequestRecord(
                request_id=f"{arm}-{repeat}-{index}",
                arm=arm,
                repeat=repeat,
                arrival_s=request.arrival_s,
                sent_s=one["sent_s"],
                prompt_tokens=request.prompt_tokens,
                output_tokens=len(times),
                expected_output_tokens=request.output_tokens,
                first_token_s=times[0] if times else None,
                last_token_s=times[-1] if times else None,
                session=request.session,
                status="failed" if "error" in one else "ok",
                error=one.get("error"),
                index=index,
            )
        )
    return made


def hit_rate(found: list[dict[str, Any]], trace: Trace) -> float:
    """Of prompt tokens, those that the engine found in its cache."""
    cached = sum(one.get("cached") or 0 for one in found)
    return cached / sum(request.prompt_tokens for request in trace.requests)


async def measure(bed: Bed, args: argparse.Namespace, folder: Path) -> None:
    """All turns, then a replica killed under each arm."""
    for name in ARMS:
        await bed.replay(bed.trace(98, 4.0, 24), name, (1,))
    requests = max(20, int(args.rate * args.span))
    info = RunInfo(
        kind="bench",
        command=tuple(sys.argv),
        seed=args.seed,
        repeats=args.turns,
        trace={"name": "chat", "rate_rps": args.rate},
        arms={name: {} for name in ARMS},
        environment=describe_environment(),
        slo={},
    )
    beside: dict[str, Any] = {"hits": {name: [] for name in ARMS}, "kills": {}}
    beside["served"] = {name: [] for name in ARMS}
    with RunWriter(folder, info) as writer:
        for repeat, order in enumerate(turns(list(ARMS), args.turns)):
            for name in order:
                trace = bed.trace(args.seed + repeat, args.rate, requests)
                found = await bed.replay(trace, name, (7, args.seed, repeat))
                writer.write(records(found, trace, name, repeat))
                beside["hits"][name].append(hit_rate(found, trace))
                served = Counter(one.get("pid") for one in found)
                beside["served"][name].append(sorted(served.values()))
                print(
                    f"turn {repeat}: {name}, {beside['hits'][name][-1]:.2f} from cache", flush=True
                )
    for name in ARMS:
        beside["kills"][name] = await killed(bed, name, args.rate)
    (folder / "beside.json").write_text(json.dumps(beside))


async def killed(bed: Bed, arm: str, rate_rps: float) -> dict[str, Any]:
    """What became of requests when a replica died in the middle."""
    trace = bed.trace(50, rate_rps, int(rate_rps * 16))
    warm = await bed.replay(bed.trace(97, 4.0, 12), arm, (2,))
    victim = psutil.Process(warm[-1]["pid"])

    async def end() -> None:
        await asyncio.sleep(8.0)
        for process in (victim, *victim.children(recursive=True)):
            os.kill(process.pid, signal.SIGKILL)

    found, _ = await asyncio.gather(bed.replay(trace, arm, (9,)), end())
    lost = [one for one in found if "error" in one]
    held = [one for one in found if one["sent_s"] < 8.0 < one["ended_s"]]
    return {
        "requests": len(found),
        "in_flight": len(held),
        "lost": len(lost),
        "errors": sorted({one["error"] for one in lost}),
        "served_after": sum(one["sent_s"] > 8.5 and "error" not in one for one in found),
        "sent_after": sum(one["sent_s"] > 8.5 for one in found),
    }


def main() -> None:
    """Measures, or reports what has been measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--report", action="store_true", help="of what has been measured")
    parser.add_argument("--turns", type=int, default=6, help="of every arm")
    parser.add_argument("--span", type=float, default=40.0, help="seconds of arrivals of a turn")
    parser.add_argument("--rate", type=float, default=1.5, help="requests per second")
    parser.add_argument("--kv-mb", type=int, default=32, help="KV memory of an engine")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not args.report:
        import ray
        from ray import serve

        from gimbal.board.file import sweep

        args.folder.mkdir(parents=True)
        # What Ray's workers import: this folder's packages.
        os.environ["PYTHONPATH"] = os.pathsep.join(
            filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))
        )
        ray.init(
            address="local", num_cpus=4, include_dashboard=False, log_to_driver=False,
            object_store_memory=80 << 20,
        )  # fmt: skip
        try:
            bed = Bed(args.folder.resolve(), args.kv_mb << 20)
            asyncio.run(measure(bed, args, args.folder))
        finally:
            serve.shutdown()
            ray.shutdown()
            sweep()  # the boards of those that were killed
    console = Console(width=110)
    beside = json.loads((args.folder / "beside.json").read_text())
    hits = {name: f"{100 * statistics.mean(own):.0f} %" for name, own in beside["hits"].items()}
    console.print(table(args.folder, ARMS, BASE, {"from cache": hits}))
    for name, found in beside["kills"].items():
        console.print(f"replica killed, {name}: {found}")


if __name__ == "__main__":
    main()
