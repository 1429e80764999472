"""Gimbal's metrics in vLLM's own ``/metrics``.

They live in the default registry of ``prometheus_client``, which vLLM serves; with several API
servers the library keeps them in the folder vLLM sets up and adds them over processes. Every series
that can be foreseen exists before its first event, so that ``increase()`` sees that event.
Decisions are counted as they happen, and what engines count twice a second. Gauges are set from the
latest state at every scrape, or a few engines at a time where nobody tells of scrapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from prometheus_client import Counter, Gauge, Histogram

from gimbal.core.config import LEVELS
from gimbal.core.contracts import EngineLoads
from gimbal.core.dispatch.dispatcher import Decision
from gimbal.core.dispatch.server_load import first_token_us
from gimbal.vllm_plugin.dispatch.row_metrics import RowMetrics
from gimbal.vllm_plugin.metrics import MODEL, announce_build

FALLBACKS = (
    "account",
    "count",
    "error",
    "finished",
    "inflight_error",
    "not_entered",
    "refresh",
    "session",
    "settle",
    "stale",
)
"""Every reason that this package gives its guards for level ``dispatch``."""
TRACE_FALLBACKS = ("received", "sent")
"""The same for ``trace``: what a recording of requests missed."""
BY_POLICY = ("policy", "session", "stale", "inflight")
"""Reasons of a decision of the policy in force, or in its stead."""
BY_VLLM = ("policy", "pinned", "late_interaction", "fallback")
"""Reasons of one that vLLM's method made."""
VLLM = "vllm"
"""Name of the policy that is vLLM's own method, called and not imitated."""

_DECISION_BUCKETS = (5e-6, 1e-5, 1.5e-5, 2e-5, 3e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 5e-3, 2e-2)
_AGE_BUCKETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


_GAUGES: tuple[tuple[str, str, Any, tuple[str, ...]], ...] = (
    (
        "gimbal_level_state",
        "1 on, 0 off, -1 switched itself off after repeated failures",
        "min",
        ("level",),
    ),
    (
        "gimbal_dispatch_cost_seconds",
        "Predicted cost of the latest decision, by engine and term",
        "mostrecent",
        ("engine", "term"),
    ),
    (
        "gimbal_unacknowledged_tokens",
        "Prompt tokens sent to the engine that it has not taken yet",
        "livesum",
        ("engine",),
    ),
    (
        "gimbal_inflight_tokens",
        "Prompt tokens of requests sent to the engine and not finished",
        "livesum",
        ("engine",),
    ),
    (
        "gimbal_engine_predicted_time_to_first_token_seconds",
        "What dispatch predicts for a prompt of typical length that is sent to the engine now",
        "mostrecent",
        ("engine",),
    ),
)
"""Name, HELP, what the values of several API servers make together, and labels beside `MODEL`."""
SHOWN_AT_ONCE = 32
"""Engines whose gauges are set in one turn of the event loop."""


class DispatchMetrics:
    """Everything one front end reports. Made once per process: see `dispatch_metrics`.

    Attributes:
        at_scrape: somebody calls `show` before each scrape, so that `refresh` need not.
    """

    def __init__(self) -> None:
        self._decisions = Counter(
            "gimbal_dispatch_decisions_total",
            "Requests sent, by engine, policy and reason of the choice",
            (MODEL, "engine", "policy", "reason"),
        )
        self._seconds = Histogram(
            "gimbal_dispatch_decision_seconds",
            "Time of one dispatch decision, reading the board included",
            (MODEL,),
            buckets=_DECISION_BUCKETS,
        )
        self._age = Histogram(
            "gimbal_signal_age_seconds",
            "Age of the oldest engine snapshot that mattered at a decision",
            (MODEL,),
            buckets=_AGE_BUCKETS,
        )
        self._fallbacks = Counter(
            "gimbal_fallback_total",
            "Times that a front end left something to a simpler rule, by level and reason",
            (MODEL, "level", "reason"),
        )
        self._level, self._terms, self._unacked, self._inflight, self._predicted = (
            Gauge(name, text, (MODEL, *labels), multiprocess_mode=mode)
            for name, text, mode, labels in _GAUGES
        )
        self._recoveries = Counter(
            "gimbal_board_recoveries_total",
            "Times that the signal board's file was found missing, replaced or cut short",
            (MODEL,),
        )
        self._torn = Counter(
            "gimbal_board_torn_reads_total", "Rows of the board that were copied again", (MODEL,)
        )
        self._rows = RowMetrics()
        self.at_scrape = False
        self._model = ""
        self._engines = range(0)
        self._children: dict[tuple[int, str, str], Counter] = {}
        self._seen = {"recoveries": 0, "torn": 0}

    def serve(self, model: str, engines: range, counts: bool = True) -> None:
        """Makes the series of a front end that sends requests of `model` to `engines`.

        `counts` is True in the first API server of a server, see `row_metrics`.
        """
        announce_build()
        self._model, self._engines = model, engines
        self._children = {}
        self.at_scrape, self._next_shown = False, 0
        self._accounts = np.full((2, 0), np.nan)
        for engine in engines:
            self._predicted.labels(model, str(engine))
        for family in (self._recoveries, self._torn):
            family.labels(model)
        # Looked up once: every decision observes both.
        self._timed = self._seconds.labels(model), self._age.labels(model)
        for reason in FALLBACKS:
            self._fallbacks.labels(model, "dispatch", reason)
        for reason in TRACE_FALLBACKS:
            self._fallbacks.labels(model, "trace", reason)
        self._rows.serve(model, engines, counts)

    def policy_in_force(self, policy: str) -> None:
        """Makes the series of its decisions."""
        reasons = [(VLLM, reason) for reason in BY_VLLM]
        if policy != VLLM:
            reasons += [(policy, reason) for reason in BY_POLICY]
        for engine in self._engines:
            for name, reason in reasons:
                self._decision((engine, name, reason))

    def _decision(self, key: tuple[int, str, str]) -> Counter:
        engine, policy, reason = key
        child = self._decisions.labels(self._model, str(engine), policy, reason)
        self._children[key] = child
        return child

    def decided(self, key: tuple[int, str, str]) -> None:
        """Counts one request sent to an engine: `key` is engine, policy and reason."""
        child = self._children.get(key)
        (child or self._decision(key)).inc()

    def timed(self, seconds: float, signal_age_us: float) -> None:
        """One decision of Gimbal's: how long it took and how old its signals were."""
        durations, ages = self._timed
        durations.observe(seconds)
        ages.observe(signal_age_us / 1e6)

    def fell_back(self, level: str, reason: str) -> None:
        """Signature of ``LevelGuard.on_fallback``."""
        self._fallbacks.labels(self._model, level, reason).inc()

    def levels_in_force(self, levels: Sequence[str]) -> None:
        """All other levels are off."""
        for level in LEVELS:
            self._level.labels(self._model, level).set(int(level in levels))

    def switched_itself_off(self, level: str) -> None:
        """After repeated failures."""
        self._level.labels(self._model, level).set(-1)

    def refresh(self, first: int, loads: EngineLoads, decision: Decision | None) -> None:
        """Twice a second on the event loop: counts, and shows what no scrape asks for."""
        self._rows.count(first, loads.board)
        self._account(first, loads)
        if not self.at_scrape:
            start = self._next_shown if self._next_shown < len(loads.board) else 0
            self._next_shown = start + SHOWN_AT_ONCE
            self.show(first, loads, decision, slice(start, self._next_shown))

    def count(self, first: int, loads: EngineLoads) -> None:
        """What the engines from rank `first` on have counted, where nobody calls `refresh`."""
        self._rows.count(first, loads.board)

    def show(
        self,
        first: int,
        loads: EngineLoads,
        decision: Decision | None,
        part: slice = slice(None),
    ) -> None:
        """Sets the gauges of `part` of the engines from rank `first` on, in any thread."""
        self._rows.show(first, loads.board, part)
        engines = range(first, first + len(loads.board))[part]
        for engine, us in zip(engines, first_token_us(loads)[part].tolist(), strict=True):
            self._predicted.labels(self._model, str(engine)).set(us / 1e6)
        if decision is None or decision.terms is None:
            return
        for name, values in zip(decision.term_names, decision.terms.tolist(), strict=True):
            for engine, us in enumerate(values[part], engines.start):
                self._terms.labels(self._model, str(engine), name).set(us / 1e6)

    def _account(self, first: int, loads: EngineLoads) -> None:
        """Every API server has accounts of its own, and a scrape asks one of them only."""
        accounts = np.stack([loads.unacked_tokens, loads.inflight_tokens])
        before = self._accounts
        if before.shape != accounts.shape:
            before = np.full(accounts.shape, np.nan)
        families = self._unacked, self._inflight
        for which, index in np.argwhere(before != accounts).tolist():
            child = families[which].labels(self._model, str(first + index))
            child.set(accounts[which, index])
        self._accounts = accounts

    def board_state(self, recoveries: int, torn: int) -> None:
        """Totals of the board since this process started."""
        for counter, key, total in (
            (self._recoveries, "recoveries", recoveries),
            (self._torn, "torn", torn),
        ):
            if total > self._seen[key]:
                counter.labels(self._model).inc(total - self._seen[key])
                self._seen[key] = total


@lru_cache(maxsize=1)
def dispatch_metrics() -> DispatchMetrics:
    """The process's metrics; a name can be registered only once."""
    return DispatchMetrics()
