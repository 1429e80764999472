"""What watching costs: page, metrics and records on against off, in turns on two demo servers.

    python benchmarks/watched.py part-1 --seed 0
    python benchmarks/watched.py part-2 --seed 100
    python benchmarks/watched.py --report part-1 part-2
    python benchmarks/watched.py one --one-server

Two servers alike differ by more than what is looked for (one pair by 0.84 in mean TTFT, in favour
of the one that was watched), so that many pairs are needed. With ``--one-server`` both arms are
turns of the same one, which always records: what is measured is the page and the metrics.

Both servers have every level and stay up together, so that a start is paid once. Off: nobody
looks, nothing is written. On: ``/gimbal/view`` is asked as the open page asks it, ``/metrics`` is
scraped every five seconds (three times as often as in examples/observability), and the traces of
requests, engine steps and rearrangements are recorded. The gate lets no proposal pass: windows are
judged and recorded, but the servers' experts stay where they are, the same in both.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.table import Table

from gimbal.bench.arms import ServerSpec
from gimbal.bench.servers import ServerPool
from gimbal.bench.session import BenchOptions, BenchSession
from gimbal.bench.turns import plan_turns
from gimbal.core.config import LEVELS
from gimbal.core.web import open_url
from gimbal.records.environment import describe_environment
from gimbal.records.schema import RequestRecord, RunInfo
from gimbal.records.store import RunReader, RunWriter
from gimbal.report.arms import Arm
from gimbal.report.compare import compare
from gimbal.report.metrics import Slo, summarize
from gimbal.workloads import WorkloadOptions, load_trace
from gimbal.workloads.prompts import read_vocabulary

SCRAPE_S = 5.0
SHOWN = {"ttft_ms": "TTFT", "tpot_ms": "TPOT"}
STATISTICS = ("mean", "p50", "p99")


class QuietPool(ServerPool):
    """Servers that write down only what their arm says."""

    def _recorded(self, spec: ServerSpec) -> str:
        return spec.config_json


def arms_of(folder: Path, one_server: bool = False) -> list[Arm]:
    """Off and on; of one server, both with records."""
    still = {"levels": list(LEVELS), "placement": {"gate": 1e6}}
    records = str(folder / "records")
    on = still | {"trace_records": records, "step_records": records}
    on["placement"] = {"gate": 1e6, "records": records}
    return [Arm("off", config=on if one_server else still), Arm("on", config=on)]


@contextmanager
def watched(url: str, replies: Counter[str]) -> Iterator[None]:
    """Somebody looks meanwhile; `replies` counts how often each route answered."""
    stop, failed = threading.Event(), []

    def ask(path: str) -> bytes:
        with open_url(url + path, 30) as reply:
            body: bytes = reply.read()
        replies[path.partition("?")[0]] += 1
        return body

    def watch() -> None:
        taken, every_s, scrape_s = -1, 0.0, time.monotonic()
        try:
            while not stop.wait(every_s):
                view = json.loads(ask(f"/gimbal/view?span=fine&after={taken}"))
                taken, every_s = view["taken"], view["every_s"]
                if time.monotonic() >= scrape_s:
                    ask("/metrics")
                    scrape_s += SCRAPE_S
        except Exception as error:  # re-raised below, in the thread that measures
            failed.append(error)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    if failed:
        raise failed[0]


def measure(args: argparse.Namespace, folder: Path) -> None:
    """All turns of one pair of servers, into `folder`."""
    arms = arms_of(folder, args.one_server)
    workload = WorkloadOptions(
        rate_rps=args.rate, arrivals="gamma", cv=0.1, max_prompt=512, max_output=64
    )
    options = BenchOptions(
        load_trace("burst"),
        workload,
        repeats=args.repeat,
        seed=args.seed,
        salt=int(time.time()),
        duration_s=args.duration,
        warm_up=8,
        share=False,
    )
    info = RunInfo(
        kind="bench",
        command=tuple(sys.argv),
        seed=args.seed,
        repeats=args.repeat,
        trace={"name": "burst"},
        arms={arm.name: arm.to_json() for arm in arms},
        environment=describe_environment(),
        slo={},
    )
    replies: Counter[str] = Counter()
    pool = QuietPool(("--demo",), folder, resident=2, say=lambda text: print(text, flush=True))
    with RunWriter(folder, info) as writer:
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
            plan = plan_turns(arms, args.repeat, share=False)
            for turn in plan:  # none starts while another is measured
                pool.get(turn.spec)
            for turn in plan:
                if turn.arm.name == "off":
                    session.run(turn)
                    continue
                with watched(pool.get(turn.spec).endpoint.url, replies):
                    session.run(turn)
        finally:
            pool.close()
        session.report()
    sizes = {path.name: path.stat().st_size for path in sorted((folder / "records").iterdir())}
    print(f"answered {dict(replies)}; bytes written {sizes}")


def runs_of(folders: list[Path]) -> dict[str, list[list[RequestRecord]]]:
    """Turns that both arms have run, those of all folders after each other."""
    runs: dict[str, list[list[RequestRecord]]] = {"off": [], "on": []}
    for folder in folders:
        reader = RunReader(folder)
        info, requests = reader.info(), reader.requests()
        done = Counter(row["repeat"] for row in info.runs)
        for repeat in sorted(k for k, arms in done.items() if arms == len(runs)):
            for name, own in runs.items():
                own.append([r for r in requests if (r.arm, r.repeat) == (name, repeat)])
    return runs


def table(folders: list[Path]) -> Table:
    """Latencies of both, and their ratio."""
    runs = runs_of(folders)
    figures = {name: summarize(own, Slo()) for name, own in runs.items()}
    ratios = compare(runs, "off", Slo())["on"]
    view = Table(title=f"{len(runs['on'])} turns each, {len(folders)} pairs of servers")
    for name in ("", "off ms", "on ms", "on / off [95 %]"):
        view.add_column(name, justify="right" if name else "left")
    for metric, title in SHOWN.items():
        for key in STATISTICS:
            found = ratios[f"{metric}.{key}"]
            view.add_row(
                f"{title} {key}",
                *(f"{figures[name][metric][key]:.2f}" for name in runs),
                f"{found.ratio:.4f} [{found.low:.4f}, {found.high:.4f}]",
            )
    ended = [f"{name}: {f['completed']} of {f['requests']}" for name, f in figures.items()]
    view.caption = f"completed: {', '.join(ended)}"
    return view


def main() -> None:
    """Measures one part, or reports some."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="+", metavar="DIR")
    parser.add_argument("--report", action="store_true", help="of parts that have been measured")
    parser.add_argument("--one-server", action="store_true", help="page and metrics alone")
    parser.add_argument("--rate", type=float, default=6.0, help="requests per second")
    parser.add_argument("--duration", type=float, default=20.0, help="seconds per turn")
    parser.add_argument("--repeat", type=int, default=4, help="turns of either")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not args.report:
        for folder in args.folders:
            (folder / "records").mkdir(parents=True)
            measure(args, folder.resolve())
    Console(width=100).print(table(args.folders))


if __name__ == "__main__":
    main()
