"""What the engines did, in bands instead of a line per engine, for as long as a page needs it.

A sample every few seconds: of every quantity the tenth, fifth and ninth decile over engines and
the worst engine; what happened since the sample before; what clients waited. The last ten minutes
are kept as they are, the last twelve hours by the minute: some 500 KB in an API server, whatever
the number of engines.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from gimbal.core.contracts import FloatArray
from gimbal.core.snapshot import ACCEPTED_REQUESTS, ACCEPTED_TOKENS, Field
from gimbal.vllm_plugin.operator.latency import TPOT, TTFT, Buckets, quantile_ms, since

EVERY_S = 2.0
FINE, COARSE = 300, 720
PER_COARSE = 30
"""Samples of one in the long history: a minute."""
_PER_LATENCY = 5
"""Samples between two readings of the latencies: reading them costs more than all else."""
_SUMS = ("requests", "preempted", "fallbacks", "moved", "commits")

Sample = dict[str, Any]


def backlog_tokens(rows: FloatArray) -> FloatArray:
    """[engines] prompt tokens that wait or are being prefilled."""
    return np.asarray(rows[:, Field.WAITING_PREFILL_TOKENS] + rows[:, Field.RUNNING_PREFILL_TOKENS])


def kv_used(rows: FloatArray) -> FloatArray:
    """[engines] share of the KV blocks that are in use."""
    total = rows[:, Field.KV_BLOCKS_TOTAL]
    return np.asarray(rows[:, Field.KV_BLOCKS_USED] / np.maximum(total, 1.0))


def pressure_ms(rows: FloatArray) -> FloatArray:
    """[engines] how long the prefill lasts that is queued or runs: what a new prompt waits for.

    Term `queue` of dispatch policy `gimbal` without what is not acknowledged yet.
    """
    room = np.maximum(rows[:, Field.STEP_TOKEN_BUDGET] - rows[:, Field.DECODING_REQUESTS], 1.0)
    token_us = rows[:, Field.PREFILL_US_PER_TOKEN].max(initial=0.0)
    base_us = rows[:, Field.STEP_BASE_US].max(initial=0.0)
    return np.asarray(backlog_tokens(rows) * (token_us + base_us / room.mean()) / 1e3)


BANDS: dict[str, Callable[[FloatArray], FloatArray]] = {
    "pressure_ms": pressure_ms,
    "running": lambda rows: rows[:, Field.RUNNING_REQUESTS],
    "kv": kv_used,
    "step_ms": lambda rows: rows[:, Field.STEP_TIME_US] / 1e3,
}


class History:
    """The samples of one server, and the counters that the next one starts from."""

    def __init__(self) -> None:
        self.spans: dict[str, deque[Sample]] = {
            "fine": deque(maxlen=FINE),
            "coarse": deque(maxlen=COARSE),
        }
        self.taken = {"fine": 0, "coarse": 0}
        self._rows: FloatArray | None = None
        self._dispatch_fallbacks = 0.0
        self._latencies: dict[str, Mapping[str, Buckets]] = {}
        self._minute: list[Sample] = []

    @property
    def wants_latencies(self) -> bool:
        """Whether the next sample should come with them."""
        return self.taken["fine"] % _PER_LATENCY == 0

    def add(
        self,
        now_s: float,
        rows: FloatArray,
        first: int,
        fallbacks: float,
        latencies: Mapping[str, Buckets] | None = None,
        events: Sequence[str] = (),
    ) -> None:
        """Takes a sample.

        Args:
            now_s: time of the day, which pages show.
            rows: [engines, ROW_WIDTH] of the board, the first of engine `first`.
            fallbacks: of dispatch, in all front ends since the start.
            latencies: of all front ends since the start, where `wants_latencies`.
            events: what a person should find again later.
        """
        sample: Sample = {"t": round(now_s, 1), **_bands(rows, first), **self._happened(rows)}
        sample["fallbacks"] += max(fallbacks - self._dispatch_fallbacks, 0.0)
        self._dispatch_fallbacks = fallbacks
        if latencies is not None:
            sample |= self._waited("fine", latencies)
        said = [*events, *self._engines_restarted(rows, first)]
        if said:
            sample["events"] = said[:8]
        self._rows = rows
        self._keep("fine", sample)
        self._minute.append(sample)
        if len(self._minute) == PER_COARSE:
            minute = _merged(self._minute)
            if latencies is None:
                latencies = self._latencies.get("fine")
            if latencies is not None:
                minute |= self._waited("coarse", latencies)
            self._keep("coarse", minute)
            self._minute = []

    def after(self, span: str, number: int) -> list[Sample]:
        """Samples of `span` after the first `number` ones, as far as they are kept."""
        kept, taken = self.spans[span], self.taken[span]
        new = taken - number if 0 <= number <= taken else taken
        return list(kept)[max(len(kept) - new, 0) :]

    def _keep(self, span: str, sample: Sample) -> None:
        self.spans[span].append(sample)
        self.taken[span] += 1

    def _waited(self, span: str, latencies: Mapping[str, Buckets]) -> Sample:
        """Median and ninth decile of TTFT and TPOT since the reading before of the same span."""
        before = self._latencies.get(span)
        self._latencies[span] = latencies
        if before is None:
            return {}
        found = {}
        for kind in (TTFT, TPOT):
            recent = since(latencies.get(kind, {}), before.get(kind, {}))
            found[kind] = [quantile_ms(recent, 0.5), quantile_ms(recent, 0.9)]
        return found

    def _happened(self, rows: FloatArray) -> Sample:
        before = self._rows
        if before is None or before.shape != rows.shape:
            return dict.fromkeys(_SUMS, 0.0)
        # The totals of an engine that was started anew begin at 0.
        same = (rows[:, Field.EPOCH] == before[:, Field.EPOCH])[:, None]
        new = np.maximum(rows - np.where(same, before, 0.0), 0.0)
        newest = int(rows[:, Field.PLACEMENT_PROPOSALS].argmax())
        held = before[:, (Field.PLACEMENT_COMMITS, Field.PLACEMENT_RECEIVED_EXPERTS)].max(axis=0)
        commits, moved = held
        return {
            "requests": float(new[:, ACCEPTED_REQUESTS:ACCEPTED_TOKENS].sum()),
            "preempted": float(new[:, Field.PREEMPTIONS].sum()),
            "fallbacks": float(new[:, (Field.QUEUE_FALLBACKS, Field.PLACEMENT_FALLBACKS)].sum()),
            "moved": max(float(rows[newest, Field.PLACEMENT_RECEIVED_EXPERTS] - moved), 0.0),
            "commits": max(float(rows[newest, Field.PLACEMENT_COMMITS] - commits), 0.0),
        }

    def _engines_restarted(self, rows: FloatArray, first: int) -> list[str]:
        before = self._rows
        if before is None or before.shape != rows.shape:
            return [] if before is None else [f"{len(before)} engines became {len(rows)}"]
        started = before[:, Field.SEQUENCE] > 0
        changed = (rows[:, Field.EPOCH] != before[:, Field.EPOCH]) & started
        return [f"engine {first + index} was started anew" for index in np.flatnonzero(changed)]


def _bands(rows: FloatArray, first: int) -> Sample:
    bands: Sample = {
        "waiting": float(rows[:, Field.WAITING_REQUESTS].sum()),
        "oldest_ms": round(float(rows[:, Field.QUEUE_OLDEST_WAIT_US].max(initial=0.0)) / 1e3, 1),
    }
    for name, of in BANDS.items():
        values = of(rows)
        worst = int(values.argmax())
        deciles = np.percentile(values, (10, 50, 90)).tolist()
        bands[name] = [*(round(v, 4) for v in (*deciles, float(values[worst]))), first + worst]
    return bands


def _merged(samples: Sequence[Sample]) -> Sample:
    """One sample of a minute: mean deciles, the worst engine's worst, and sums."""
    minute: Sample = {"t": samples[-1]["t"]}
    for name in _SUMS:
        minute[name] = sum(s[name] for s in samples)
    for name in ("waiting", "oldest_ms"):
        minute[name] = round(max(s[name] for s in samples), 1)
    for name in BANDS:
        deciles = np.mean([s[name][:3] for s in samples], axis=0).tolist()
        worst = max((s[name][3:] for s in samples), key=lambda pair: pair[0])
        minute[name] = [*(round(v, 4) for v in deciles), *worst]
    events = [event for s in samples for event in s.get("events", ())]
    if events:
        minute["events"] = events[:8]
    return minute
