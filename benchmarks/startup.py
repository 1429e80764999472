"""Starts the demo server several times: seconds to each phase and to ready, and its memory.

    python benchmarks/startup.py [--repeat 5] [--spawn] [vLLM flags]

Memory is measured after one completion: RSS summed over the processes (pages they share count in
each) and PSS (shared pages divided among them).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

from gimbal.bench.servers import free_port
from gimbal.core.web import open_url

_PHASE = re.compile(r"^gimbal: (.*) \((\d+) s\)$")


def complete(port: int) -> None:
    body = {"model": "gimbal-demo", "prompt": "hello", "max_tokens": 8, "ignore_eos": True}
    url, headers = f"http://127.0.0.1:{port}/v1/completions", {"Content-Type": "application/json"}
    with open_url(url, 120, json.dumps(body).encode(), headers) as reply:
        assert json.load(reply)["usage"]["completion_tokens"] == 8


def memory_gib(pids: list[int]) -> tuple[float, float]:
    """(RSS, PSS) of `pids` together."""
    rss = pss = 0
    for pid in pids:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        rss += int(re.search(r"^Rss:\s+(\d+)", text, re.MULTILINE)[1])
        pss += int(re.search(r"^Pss:\s+(\d+)", text, re.MULTILINE)[1])
    return rss / 2**20, pss / 2**20


def start_once(flags: list[str], spawn: bool) -> dict[str, float]:
    """Phase -> seconds since the start, plus ``ready``, ``rss_gib``, ``pss_gib``, ``stop``."""
    from gimbal.vllm_plugin.serve.processes import descendants_of

    port = free_port()
    environment = os.environ | ({"GIMBAL_ZYGOTE": "0"} if spawn else {})
    start_s = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "gimbal.cli", "serve", "--demo", "--port", str(port), *flags],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        text=True,
    )
    row: dict[str, float] = {}
    assert process.stdout is not None
    for line in process.stdout:
        if found := _PHASE.match(line.strip()):
            row[found[1]] = time.perf_counter() - start_s
        elif line.startswith("gimbal: ready in"):
            row["ready"] = time.perf_counter() - start_s
            break
    else:
        raise SystemExit("the server did not become ready; see gimbal serve --demo")
    complete(port)
    row["rss_gib"], row["pss_gib"] = memory_gib([process.pid, *descendants_of(process.pid)])
    stop_s = time.perf_counter()
    process.send_signal(signal.SIGTERM)
    process.stdout.read()
    process.wait()
    row["stop"] = time.perf_counter() - stop_s
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=5, help="starts (default 5)")
    parser.add_argument("--spawn", action="store_true", help="without the zygote, as vLLM does")
    options, flags = parser.parse_known_args()
    rows = [start_once(flags, options.spawn) for _ in range(options.repeat)]
    print(f"{'':40} {'median':>8} {'min':>8} {'max':>8}")
    for name in rows[0]:
        values = [row[name] for row in rows if name in row]
        unit = "GiB" if name.endswith("gib") else "s"
        print(
            f"{name:36} {unit:>3} {statistics.median(values):8.2f} "
            f"{min(values):8.2f} {max(values):8.2f}"
        )


if __name__ == "__main__":
    main()
