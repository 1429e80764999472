"""What watching costs: page, metrics and records on against off, in blocks of one server's life.

    python benchmarks/watched.py part-1 --minutes 15 --seed 0
    python benchmarks/watched.py --report part-1 part-2

Two servers alike differ by more than what is looked for (one pair by 0.84 in mean TTFT), and so do
two turns of tens of seconds. Here one demo server with every level gets equal requests at a steady
rate, and its time is cut into short blocks, in pairs of which one, by chance, is watched. What is
compared is the requests that were sent and answered within a block; its first moments belong to
neither.

Watched: ``/gimbal/view`` is asked as the open page asks it, ``/metrics`` is scraped once a block
(oftener than in examples/observability), and the traces of requests, engine steps and
rearrangements are recorded. Else nobody looks, and nothing is written (`quiet_records`). The gate
lets no proposal pass: windows are judged and recorded, and the experts stay where they are.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from gimbal.bench.arms import ServerSpec
from gimbal.bench.client import Client, ClientResult
from gimbal.bench.client_process import ReplayJob, encode_requests, run_replay
from gimbal.bench.servers import Server, ServerPool
from gimbal.core.config import LEVELS
from gimbal.core.web import open_url
from gimbal.records.environment import describe_environment
from gimbal.records.schema import RequestRecord, RunInfo
from gimbal.records.store import RunReader, RunWriter
from gimbal.report.compare import compare, whole_turns
from gimbal.report.metrics import Slo, summarize
from gimbal.workloads.prompts import read_vocabulary
from gimbal.workloads.trace import Trace, TraceRequest

PROMPT_TOKENS, OUTPUT_TOKENS = 96, 24
SETTLE_S = 0.7
"""Of a block's beginning: what the last one left is served, and processes have seen the file."""
SHOWN = {"ttft_ms": "TTFT", "tpot_ms": "TPOT"}
STATISTICS = ("mean", "p50", "p99")
HERE = Path(__file__).resolve().parent


class Block(NamedTuple):
    """Some seconds of the run, from `begin_s` to `end_s` after its start, watched or not."""

    pair: int
    watched: bool
    begin_s: float
    end_s: float

    def has(self, result: ClientResult) -> bool:
        """Whether a request was sent and answered in it."""
        times = result.token_times_s
        return bool(times) and self.begin_s + SETTLE_S <= result.sent_s and times[-1] <= self.end_s


def plan_blocks(pairs: int, block_s: float, seed: int) -> list[Block]:
    """Pairs of blocks, each in an order of its own."""
    rng, blocks = random.Random(seed), list[Block]()
    for pair in range(pairs):
        first = rng.random() < 0.5
        for watched in (first, not first):
            begin_s = len(blocks) * block_s
            blocks.append(Block(pair, watched, begin_s, begin_s + block_s))
    return blocks


def config_of(records: Path) -> str:
    """Of the server: every level, and everything recorded in `records`."""
    folder = str(records)
    placement = {"gate": 1e6, "records": folder}
    recorded = {"trace_records": folder, "step_records": folder, "placement": placement}
    return json.dumps({"levels": list(LEVELS), **recorded})


@contextmanager
def quiet_server(folder: Path) -> Iterator[tuple[Server, Path]]:
    """The demo server, and the file that keeps it from recording, which is there at first."""
    quiet = folder / "quiet"
    quiet.touch()
    own = (HERE / "quiet_records", HERE.parent / "tests/live/on_import")
    known = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([*map(str, own), *filter(None, [known])])
    os.environ["QUIET_FILE"] = str(quiet)
    pool = ServerPool(("--demo",), folder, say=lambda text: print(text, flush=True))
    try:
        yield pool.get(ServerSpec((), config_of(folder / "records"))), quiet
    finally:
        pool.close()


class Watcher:
    """Somebody who looks at a server while `looks` is set.

    Attributes:
        replies: how often each route answered.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.looks = threading.Event()
        self.replies: Counter[str] = Counter()
        self._over = threading.Event()
        self._failed: list[Exception] = []
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Watcher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.looks.set()
        self._thread.join()
        if self._failed:
            raise self._failed[0]

    def _ask(self, path: str) -> bytes:
        with open_url(self.url + path, 30) as reply:
            body: bytes = reply.read()
        self.replies[path.partition("?")[0]] += 1
        return body

    def _watch(self) -> None:
        taken = -1
        try:
            while self.looks.wait() and not self._over.is_set():
                self._ask("/metrics")
                while self.looks.is_set() and not self._over.is_set():
                    view = json.loads(self._ask(f"/gimbal/view?span=fine&after={taken}"))
                    taken = view["taken"]
                    self._over.wait(view["every_s"])
        except Exception as error:  # raised again at the end, in the thread that measures
            self._failed.append(error)


async def follow(blocks: Iterable[Block], switch: Callable[[bool], None]) -> None:
    """Calls `switch` at the beginning of every block."""
    start_s = time.perf_counter()
    for block in blocks:
        await asyncio.sleep(start_s + block.begin_s - time.perf_counter())
        switch(block.watched)


def steady(rate_rps: float, duration_s: float, prompt_tokens: int = PROMPT_TOKENS) -> Trace:
    """Equal requests, equally far from each other."""
    count = int(rate_rps * duration_s)
    rows = (TraceRequest(i / rate_rps, prompt_tokens, OUTPUT_TOKENS) for i in range(count))
    return Trace("steady", tuple(rows))


def measure(args: argparse.Namespace, folder: Path) -> None:
    """All blocks of one server, into `folder`."""
    pairs = max(1, round(30 * args.minutes / args.block))
    blocks = plan_blocks(pairs, args.block, args.seed)
    trace = steady(args.rate, blocks[-1].end_s)
    with quiet_server(folder) as (server, quiet), Watcher(server.endpoint.url) as watcher:

        def switch(on: bool) -> None:
            if on:
                quiet.unlink(missing_ok=True)
                watcher.looks.set()
            else:
                watcher.looks.clear()
                quiet.touch()

        model = server.endpoint.model()
        vocabulary = read_vocabulary(Path(model.root))
        salt = (int(time.time()), args.seed)
        job = ReplayJob(server.endpoint.url, model.name, trace, vocabulary, salt, "watched")
        run_replay(ReplayJob(job.url, job.model, steady(args.rate, 10), vocabulary, (1,), "warm"))

        async def both() -> list[ClientResult]:
            requests = encode_requests(job)
            client = Client(job.url)
            replay, _ = await asyncio.gather(client.replay(requests), follow(blocks, switch))
            return replay.results

        results = asyncio.run(both())
        switch(False)
    write(folder, args, blocks, trace, results)
    sizes = {path.name: path.stat().st_size for path in sorted((folder / "records").iterdir())}
    print(f"answered {dict(watcher.replies)}; bytes written {sizes}")


def write(
    folder: Path,
    args: argparse.Namespace,
    blocks: list[Block],
    trace: Trace,
    results: list[ClientResult],
) -> None:
    """The requests of every block, as records of a run: the pair is the repeat."""
    info = RunInfo(
        kind="bench",
        command=tuple(sys.argv),
        seed=args.seed,
        repeats=len(blocks) // 2,
        trace={"name": trace.name},
        arms={"off": {}, "on": {}},
        environment=describe_environment(),
        slo={},
    )
    with RunWriter(folder, info) as writer:
        for block in blocks:
            writer.write(records_of(block, results))


def records_of(block: Block, results: list[ClientResult]) -> list[RequestRecord]:
    """What was sent and answered in `block`."""
    return [
        RequestRecord(
            request_id=result.request_id,
            arm="on" if block.watched else "off",
            repeat=block.pair,
            arrival_s=result.sent_s,
            sent_s=result.sent_s,
            prompt_tokens=PROMPT_TOKENS,
            output_tokens=result.output_tokens,
            expected_output_tokens=OUTPUT_TOKENS,
            first_token_s=result.token_times_s[0],
            last_token_s=result.token_times_s[-1],
            status=result.status,
        )
        for result in results
        if block.has(result)
    ]


def runs_of(folders: list[Path]) -> dict[str, list[list[RequestRecord]]]:
    """Pairs of which both blocks have requests, those of all folders after each other."""
    runs: dict[str, list[list[RequestRecord]]] = {"off": [], "on": []}
    for folder in folders:
        for name, own in whole_turns(RunReader(folder).requests(), runs).items():
            runs[name] += own
    return runs


def table(folders: list[Path]) -> Table:
    """Latencies of both, and their ratio."""
    runs = runs_of(folders)
    figures = {name: summarize(own, Slo()) for name, own in runs.items()}
    ratios = compare(runs, "off", Slo())["on"]
    view = Table(title=f"{len(runs['on'])} pairs of blocks")
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
    parser.add_argument("--rate", type=float, default=8.0, help="requests per second")
    parser.add_argument("--minutes", type=float, default=10.0, help="of all blocks")
    parser.add_argument("--block", type=float, default=4.0, help="seconds of one")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not args.report:
        for folder in args.folders:
            (folder / "records").mkdir(parents=True)
            measure(args, folder.resolve())
    Console(width=100).print(table(args.folders))


if __name__ == "__main__":
    main()
