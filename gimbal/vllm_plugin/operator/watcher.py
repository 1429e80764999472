"""What the live page shows: looked at every two seconds, kept by the server, said once for all.

The engines' rows are the same in every API server. What an API server alone knows, its decisions
and its clients' latencies, it shares with the others (`front_ends`), so that every one of them
shows the whole server.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import numpy as np

from gimbal.core.config import LEVELS
from gimbal.core.contracts import FloatArray
from gimbal.core.dispatch import POLICIES
from gimbal.core.errors import InputError, one_line, with_type
from gimbal.core.files import structured
from gimbal.core.snapshot import Field
from gimbal.report.live_status import Status, read_status
from gimbal.vllm_plugin.dispatch.recent import KEPT
from gimbal.vllm_plugin.operator import latency
from gimbal.vllm_plugin.operator.front_ends import Shared
from gimbal.vllm_plugin.operator.history import EVERY_S, History, kv_used, pressure_ms

if TYPE_CHECKING:
    from gimbal.vllm_plugin.operator.routes import Operator

logger = logging.getLogger("vllm.gimbal")

_WAITS_KEPT = 61
"""Readings of the waits by size: those of ten minutes."""
COLUMNS = (
    "engine",
    "age_us",
    "idle",
    "waiting_requests",
    "waiting_prefill_tokens",
    "running_requests",
    "running_prefill_tokens",
    "decoding_requests",
    "step_time_us",
    "prefill_tokens_per_s",
    "expert_pressure_us",
    "queue_oldest_wait_us",
    "queue_oldest_bound_us",
    "preemptions",
    "unacknowledged_requests",
    "inflight_tokens",
)
"""Of an engine's status, as the page has them; behind them `pressure_ms`, `kv` and `sent`."""
_QUEUE = ("overtakes", "promotions", "kv_passes", "yields", "graph_steps")


class Watcher:
    """Samples one server.

    Args:
        operator: of this API server.
        shared: what several API servers tell each other; None where there is one.
    """

    def __init__(self, operator: Operator, shared: Shared | None = None) -> None:
        self.operator = operator
        self.shared = shared
        self.history = History()
        self.started_s = round(time.time(), 3)
        self._others: list[dict[str, Any]] = []
        self._latencies: dict[str, latency.Buckets] = {}
        self._waits: deque[Mapping[str, latency.Buckets]] = deque(maxlen=_WAITS_KEPT)
        self._control: tuple[int, int] | None = None
        self._off: bool = False
        self._said_trouble = False
        self._view: tuple[int, dict[str, Any]] | None = None

    def start(self) -> None:
        """Samples from now on, for as long as the event loop runs."""
        self._again(asyncio.get_running_loop())

    def _again(self, loop: asyncio.AbstractEventLoop) -> None:
        try:
            self.sample()
        except Exception as error:
            # Nobody's request waits for this: said once, and tried again.
            if not self._said_trouble:
                logger.warning("Gimbal: the live page misses a sample: %s", with_type(error))
            self._said_trouble = True
        loop.call_later(EVERY_S, self._again, loop)

    def sample(self) -> None:
        """Takes one sample of the server, and tells the other API servers of this one."""
        wanted = self.history.wants_latencies
        if wanted:
            self._latencies = latency.read_histograms()
        if self.shared is not None:
            self.shared.publish(self._own())
            self._others = self.shared.others()
        rows = self._rows()
        latencies = self._all_latencies() if wanted else None
        if latencies is not None:
            self._waits.append({k: v for k, v in latencies.items() if latency.QUEUE in k})
        dispatch = self._dispatch()
        fallbacks = sum(dispatch["fallbacks"].values()) if dispatch else 0.0
        first = self.operator.reader.first
        events = self._events(bool(dispatch and dispatch["switched_itself_off"]))
        self.history.add(time.time(), rows, first, fallbacks, latencies, events)

    def _rows(self) -> FloatArray:
        """The engines' rows; a number that is none counts nothing."""
        return np.nan_to_num(self.operator.reader.read(), nan=0.0, posinf=0.0, neginf=0.0)

    def _own(self) -> dict[str, Any]:
        front_end = self.operator.front_end
        own: dict[str, Any] = {"latency": latency.to_lists(self._latencies)}
        if front_end is not None:
            own["dispatch"] = front_end.status()
            own["recent"] = front_end.recent.explained(front_end.first)
        return own

    def _all_latencies(self) -> dict[str, latency.Buckets]:
        parts = [self._latencies]
        for other in self._others:
            with _left_out_where_wrong():
                parts.append(latency.from_lists(other["latency"]))
        return latency.added(parts)

    def _dispatch(self) -> dict[str, Any] | None:
        """`FrontEnd.status` with the counts of all front ends."""
        front_end = self.operator.front_end
        if front_end is None:
            return None
        total = front_end.status()
        for other in self._others:
            with _left_out_where_wrong():
                total = _together(total, other["dispatch"])
        return total

    def _events(self, off: bool) -> list[str]:
        """What changed since the last sample."""
        board, events = self.operator.board, []
        version = board.control_version(), board.generation
        if self._control is not None and version != self._control:
            control = board.read_control()
            said = {k: control[k] for k in ("levels", "policy", "ordering") if k in control}
            events.append(one_line(f"control: {said}"))
        self._control = version
        if off and not self._off:
            events.append("level dispatch has switched itself off")
        self._off = off
        return events

    def view(self, span: str, number: int) -> dict[str, Any]:
        """Everything the page draws, with the samples of `span` after the first `number`.

        Made once per sample, however many look. Raises OSError or ValueError when the board
        cannot be read.
        """
        taken = self.history.taken["fine"]
        if self._view is None or self._view[0] != taken:
            self._view = taken, self._now()
        samples = self.history.after(span, number)
        return self._view[1] | {"taken": self.history.taken[span], "samples": samples}

    def _now(self) -> dict[str, Any]:
        rows = self._rows()
        document = self.operator.status(rows) | {"dispatch": self._dispatch()}
        status = read_status(document)
        return {
            "version": status.version,
            "since_s": self.started_s,
            "every_s": EVERY_S,
            "front_ends": 1 + len(self._others),
            "levels": status.levels,
            "policies": status.policies,
            "trouble": status.trouble,
            "columns": [*COLUMNS, "pressure_ms", "kv", "sent"],
            "engines": self._engines(status, rows, document["dispatch"]),
            "decisions": status.decisions,
            "recent": self._recent(),
            "queue": self._queue(rows),
            "placement": _placement(rows),
            "control": self._switches(document),
        }

    def _engines(
        self, status: Status, rows: FloatArray, dispatch: Mapping[str, Any] | None
    ) -> list[list[float | None]]:
        sent: dict[int, float] = {}
        for entry in dispatch["decisions"] if dispatch else ():
            sent[entry["engine"]] = sent.get(entry["engine"], 0.0) + entry["count"]
        derived = zip(pressure_ms(rows).tolist(), kv_used(rows).tolist(), strict=True)
        return [
            [
                *(None if name not in e else round(e[name], 1) for name in COLUMNS),
                round(pressure, 3),
                round(kv, 4),
                sent.get(int(e["engine"]), 0.0),
            ]
            for e, (pressure, kv) in zip(status.engines, derived, strict=True)
        ]

    def _recent(self) -> list[dict[str, Any]]:
        front_end = self.operator.front_end
        found = [] if front_end is None else front_end.recent.explained(front_end.first)
        for other in self._others:
            with _left_out_where_wrong():
                found += sorted(other.get("recent", []), key=_time)[-KEPT:]
        return sorted(found, key=_time, reverse=True)[:KEPT]

    def _queue(self, rows: FloatArray) -> dict[str, Any]:
        """Counters of all engines since their start, and waits by size of the last ten minutes."""
        first, last = (self._waits[0], self._waits[-1]) if self._waits else ({}, {})
        waits = []
        for kind, buckets in last.items():
            recent = latency.since(buckets, first.get(kind, {}))
            deciles = [latency.quantile_ms(recent, share) for share in (0.5, 0.9)]
            waits.append([kind.removeprefix(latency.QUEUE), latency.count(recent), *deciles])
        totals = {name: rows[:, Field[f"QUEUE_{name.upper()}"]].sum().item() for name in _QUEUE}
        return {"waits": waits, **totals}

    def _switches(self, document: Mapping[str, Any]) -> dict[str, Any] | None:
        """What a form may switch; None unless the server takes control messages with a key."""
        operator = self.operator
        if not operator.config.admin or not operator.has_key:
            return None
        front_end = operator.front_end
        policies = sorted({*POLICIES.names(), front_end.policy}) if front_end is not None else []
        return {
            "policies": policies,
            "levels": [level for level in LEVELS if level in operator.switchable],
            "now": document["control"],
        }


@contextmanager
def _left_out_where_wrong() -> Iterator[None]:
    """What another API server says counts where it is what it should be."""
    with suppress(InputError), structured("another API server"):
        yield


def _time(explained: Mapping[str, Any]) -> float:
    return float(explained["time_s"])


def _together(total: dict[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    counts = dict(total["fallbacks"])
    for reason, count in other["fallbacks"].items():
        counts[reason] = counts.get(reason, 0) + float(count)
    decisions = [
        {
            "engine": int(entry["engine"]),
            "policy": str(entry["policy"]),
            "reason": str(entry["reason"]),
            "count": float(entry["count"]),
        }
        for entry in other["decisions"]
    ]
    return total | {
        "decisions": total["decisions"] + decisions,
        "fallbacks": counts,
        "switched_itself_off": total["switched_itself_off"] or bool(other["switched_itself_off"]),
    }


def _placement(rows: FloatArray) -> dict[str, float] | None:
    """What rearrangements did; None before the first proposal."""
    row = rows[rows[:, Field.PLACEMENT_PROPOSALS].argmax()]
    if not row[Field.PLACEMENT_PROPOSALS]:
        return None

    def figures(names: Sequence[str]) -> dict[str, float]:
        return {name: row[Field[f"PLACEMENT_{name.upper()}"]].item() for name in names}

    def gain_us(kind: str) -> float:
        gain, loss = figures((f"{kind}_gain_us", f"{kind}_loss_us")).values()
        return gain - loss

    names = ("proposals", "commits", "received_experts", "received_bytes", "balance", "local_share")
    return figures(names) | {
        "stall_us": rows[:, Field.PLACEMENT_STALL_US].max().item(),
        "predicted_gain_us": gain_us("predicted"),
        "realized_gain_us": gain_us("realized"),
    }
