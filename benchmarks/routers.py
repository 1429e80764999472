"""vllm-router before two demo servers: its policies in turns, then a server killed under load.

    python -m venv router && router/bin/pip install vllm-router
    python benchmarks/routers.py DIR --router router/bin/vllm-router
    python benchmarks/routers.py DIR --report

Each server is one engine on one core, with every level that one engine has and `get_load` set. Its
``power_of_two`` goes by the router's own counts until it has asked for loads; arm ``gimbal-load``
is the same policy asking ``GET /get_load`` of Gimbal every second. Lengths are BurstGPT's, the same
requests in every arm of a turn. The rate is a share of what both servers finish a second of a pile
of requests. A server is killed with SIGKILL, all processes of it, in the middle of a run at half
that rate.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from gimbal.bench.arms import ServerSpec
from gimbal.bench.client import Replay
from gimbal.bench.client_process import ReplayJob, run_replay
from gimbal.bench.endpoint import Endpoint
from gimbal.bench.servers import Server, free_port
from gimbal.bench.session import to_records
from gimbal.bench.turns import Turn
from gimbal.records.environment import describe_environment
from gimbal.records.schema import RunInfo
from gimbal.records.store import RunReader, RunWriter
from gimbal.report.arms import Arm
from gimbal.report.compare import compare, turns, whole_turns
from gimbal.report.metrics import Slo, summarize
from gimbal.workloads import WorkloadOptions, build_workload, load_trace
from gimbal.workloads.prompts import Vocabulary, read_vocabulary
from gimbal.workloads.trace import Trace

ARMS = {
    "round_robin": ("round_robin", 3600),
    "cache_aware": ("cache_aware", 3600),
    "power_of_two": ("power_of_two", 3600),
    "gimbal-load": ("power_of_two", 1),
}
"""The router's policy, and the seconds between two questions for loads."""
BASE, OURS = "power_of_two", "gimbal-load"
SHOWN = {"ttft_ms.mean": "mean TTFT", "ttft_ms.p99": "P99 TTFT", "tpot_ms.mean": "mean TPOT"}
PILE = 64
SPEC = ServerSpec((), "{}")


def start_server(core: int, folder: Path) -> Server:
    """One engine on `core`."""
    port, log = free_port(), folder / f"server-{core}-{time.time_ns()}.log"
    flags = ["--data-parallel-size", "1", "--no-enable-eplb", "--no-enable-expert-parallel"]
    flags += ["--additional-config", '{"gimbal": {"get_load": true}}']
    command = [sys.executable, "-m", "gimbal.cli", "serve", "--demo", "--port", str(port), *flags]
    log_file = log.open("wb")
    environment = os.environ | {"VLLM_CPU_OMP_THREADS_BIND": str(core)}
    process = subprocess.Popen(
        command, stdout=log_file, stderr=log_file, env=environment, process_group=0
    )
    return Server(SPEC, Endpoint(f"http://127.0.0.1:{port}"), process, log, log_file)


@contextmanager
def router(program: Path, arm: str, servers: Sequence[Server], folder: Path) -> Iterator[Endpoint]:
    """vllm-router before `servers`, by the policy of `arm`."""
    policy, interval_s = ARMS[arm]
    port, log = free_port(), folder / "router.log"
    command = [str(program), "--policy", policy, "--port", str(port), "--log-level", "warning"]
    command += ["--worker-startup-check-interval", str(interval_s)]
    command += ["--prometheus-port", str(free_port())]
    command += ["--worker-urls", *(server.endpoint.url for server in servers)]
    with log.open("ab") as log_file:
        process = subprocess.Popen(command, stdout=log_file, stderr=log_file, process_group=0)
        own = Server(SPEC, Endpoint(f"http://127.0.0.1:{port}"), process, log, log_file)
        try:
            own.wait_ready()
            time.sleep(1.5)  # it has asked for the first loads
            yield own.endpoint
        finally:
            own.stop()


class Bed:
    """Two servers, and what is sent to them through a router."""

    def __init__(self, servers: list[Server], program: Path, folder: Path) -> None:
        self.servers, self.program, self.folder = servers, program, folder
        model = servers[0].endpoint.model()
        self.model: str = model.name
        self.vocabulary: Vocabulary = read_vocabulary(Path(model.root))

    def trace(self, seed: int, rate_rps: float, requests: int) -> Trace:
        """Lengths of BurstGPT, Poisson arrivals."""
        options = WorkloadOptions(
            rate_rps=rate_rps, arrivals="poisson", requests=requests, max_total=2048
        )
        return build_workload(load_trace("burst"), options, seed, self.vocabulary.names)

    def replay(self, trace: Trace, arm: str, salt: tuple[int, ...]) -> Replay:
        """`trace` through the router of `arm`; servers are idle before and after."""
        with router(self.program, arm, self.servers, self.folder) as endpoint:
            prefix = "-".join(map(str, salt))
            limits = 120.0, 120.0
            job = ReplayJob(endpoint.url, self.model, trace, self.vocabulary, salt, prefix, *limits)
            replay = run_replay(job)
        for server in self.servers:
            if server.process.poll() is None:
                server.endpoint.wait_idle(90)
        return replay


def measure(args: argparse.Namespace, folder: Path) -> None:
    """All turns, then one server killed under each of two arms."""
    servers: list[Server] = []
    try:
        for core in range(2):
            servers.append(start_server(core, folder))
        for server in servers:
            server.wait_ready()
        bed = Bed(servers, args.router, folder)
        bed.replay(bed.trace(99, 4.0, 16), "round_robin", (1,))
        pile = bed.replay(bed.trace(98, 1000.0, PILE), "round_robin", (2,))
        ends = sorted(result.ended_s for result in pile.results)
        most = int(0.8 * PILE)  # the last ones leave a server idle
        rate = args.load * most / ends[most - 1]
        print(f"{rate:.2f} requests/s, {args.load:g} of what a pile is done at", flush=True)
        info = RunInfo(
            kind="bench",
            command=tuple(sys.argv),
            seed=args.seed,
            repeats=args.turns,
            trace={"name": "burst", "rate_rps": rate},
            arms={name: {} for name in ARMS},
            environment=describe_environment(),
            slo={},
        )
        with RunWriter(folder, info) as writer:
            for repeat, order in enumerate(turns(list(ARMS), args.turns)):
                for name in order:
                    trace = bed.trace(args.seed + repeat, rate, max(20, int(rate * args.span)))
                    salt = (7, args.seed, repeat, list(ARMS).index(name))
                    replay = bed.replay(trace, name, salt)
                    writer.write(to_records(Turn(repeat, Arm(name), SPEC), trace, replay))
                    print(f"turn {repeat}: {name}", flush=True)
        kills = {}
        for name in ("round_robin", OURS):
            kills[name] = kill(bed, name, rate / 2)
            servers[1].stop()
            servers[1] = start_server(1, folder)
            servers[1].wait_ready()
        (folder / "kills.json").write_text(json.dumps({"rate_rps": rate / 2, "arms": kills}))
    finally:
        for server in servers:
            server.stop()


def kill(bed: Bed, arm: str, rate_rps: float) -> dict[str, Any]:
    """What became of requests when the second server died in the middle."""
    trace = bed.trace(50, rate_rps, int(rate_rps * 30))
    held: dict[str, float] = {}

    def end() -> None:
        time.sleep(20)
        victim = bed.servers[1]
        names = ("vllm:num_requests_running", "vllm:num_requests_waiting")
        counters = victim.endpoint.counters(names)
        held.update({name: sum(values.values()) for name, values in counters.items()})
        process = psutil.Process(victim.process.pid)
        for own in (process, *process.children(recursive=True)):
            own.kill()

    thread = threading.Thread(target=end)
    thread.start()
    replay = bed.replay(trace, arm, (9, list(ARMS).index(arm)))
    thread.join()
    lost = [result for result in replay.results if result.status != "ok"]
    return {
        "requests": len(replay.results),
        "held": held,
        "lost": len(lost),
        "lost_before_a_token": sum(not result.token_times_s for result in lost),
        "errors": sorted({str(result.error)[:120] for result in lost}),
    }


def table(
    folder: Path,
    arms: Collection[str] = ARMS,
    base: str = BASE,
    beside: Mapping[str, Mapping[str, str]] | None = None,
) -> Table:
    """Latencies of all arms, and their ratios to `base`; `beside` has more columns, by title and
    arm."""
    runs, more = whole_turns(RunReader(folder).requests(), arms), beside or {}
    ratios = compare(runs, base, Slo())
    view = Table(title=f"{len(runs[base])} turns of each", caption=f"ratios to {base} [95 %]")
    for title in ("", *SHOWN.values(), *more, "ended well"):
        view.add_column(title)
    for name, own in runs.items():
        figures, cells = summarize(own, Slo()), []
        for path in SHOWN:
            metric, key = path.split(".")
            cell = f"{figures[metric][key]:.1f} ms"
            if name != base:
                ratio = ratios[name][path]
                cell += f"\n{ratio.ratio:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"
            cells.append(cell)
        cells += [column[name] for column in more.values()]
        view.add_row(name, *cells, f"{figures['completed']} of {figures['requests']}")
    return view


def main() -> None:
    """Measures, or reports what has been measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--report", action="store_true", help="of what has been measured")
    parser.add_argument("--router", type=Path, default=Path("vllm-router"), help="the program")
    parser.add_argument("--turns", type=int, default=6, help="of every policy")
    parser.add_argument("--span", type=float, default=18.0, help="seconds of arrivals of a turn")
    parser.add_argument("--load", type=float, default=0.6, help="share of what a pile is done at")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not args.report:
        args.folder.mkdir(parents=True)
        measure(args, args.folder.resolve())
    console = Console(width=110)
    console.print(table(args.folder))
    kills = json.loads((args.folder / "kills.json").read_text())
    for name, found in kills["arms"].items():
        console.print(f"server killed, {name}, {kills['rate_rps']:.2f} requests/s: {found}")


if __name__ == "__main__":
    main()
