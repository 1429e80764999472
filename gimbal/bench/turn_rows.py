"""What a turn leaves behind beside its requests: counters by engine, and what the client cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gimbal.bench.client import Replay
from gimbal.bench.endpoint import Counters
from gimbal.bench.turns import Turn
from gimbal.workloads import Trace


def run_row(
    turn: Turn, began: float, workload: Trace, replay: Replay, counters: Counters
) -> dict[str, Any]:
    """One row of a run's `runs`."""
    usage = replay.usage
    prompt = counters.get("vllm:prompt_tokens_total", {})
    output = counters.get("vllm:generation_tokens_total", {})
    return {
        "arm": turn.arm.name,
        "repeat": turn.repeat,
        "began_unix_s": round(began, 3),
        "rate_rps": workload.rate_rps,
        "requests": len(workload),
        "client": {
            "cpu_s": usage.cpu_s,
            "wall_s": usage.wall_s,
            "events": usage.events,
            "core_share": usage.core_share,
            "cpu_us_per_token": usage.cpu_us_per_token,
            "peak_streams": usage.peak_streams,
            "send_lag_p99_ms": usage.send_lag_p99_ms,
            "cpu_wait_s": usage.cpu_wait_s,
        },
        "requests_by_engine": counters.get("vllm:request_success_total", {}),
        "tokens_by_engine": {e: prompt.get(e, 0.0) + output.get(e, 0.0) for e in prompt},
        "counters": counters,
    }


def sum_engines(rows: Sequence[dict[str, Any]], key: str) -> dict[int, float]:
    """Adds up the rows' figures by engine."""
    total: dict[int, float] = {}
    for row in rows:
        for engine, value in row[key].items():
            total[engine] = total.get(engine, 0.0) + value
    return total


def hit_rate(rows: Sequence[dict[str, Any]]) -> float | None:
    """Prompt tokens found in the prefix cache, of those looked up."""
    hits, queries = (
        sum(sum(row["counters"].get(f"vllm:prefix_cache_{k}_total", {}).values()) for row in rows)
        for k in ("hits", "queries")
    )
    return hits / queries if queries else None


def client_cost(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The client over all turns: it competes with the engines for cores."""
    clients = [row["client"] for row in rows]
    wall = sum(c["wall_s"] for c in clients)
    cpu = sum(c["cpu_s"] for c in clients)
    events = sum(c["events"] for c in clients)
    return {
        "core_share": cpu / wall if wall else 0.0,
        "cpu_us_per_token": cpu * 1e6 / events if events else 0.0,
        "peak_streams": max((c["peak_streams"] for c in clients), default=0),
        "send_lag_p99_ms": max((c["send_lag_p99_ms"] for c in clients), default=0.0),
        "cpu_wait_share": sum(c["cpu_wait_s"] for c in clients) / wall if wall else 0.0,
    }
