"""Gimbal's metrics in vLLM's own ``/metrics``.

They live in the default registry of ``prometheus_client``, which vLLM serves; with several API
servers the library keeps them in the folder vLLM sets up and adds them over processes. Engines
have no ``/metrics``: what they count travels in the board's rows and becomes gauges here.
Decisions are counted as they happen; gauges are refreshed from the latest state by `refresh`.
"""

from __future__ import annotations

from functools import lru_cache

from prometheus_client import Counter, Gauge, Histogram

from gimbal.core.contracts import FloatArray
from gimbal.core.dispatch.dispatcher import Decision
from gimbal.core.snapshot import Field

_DECISION_BUCKETS = (5e-6, 1e-5, 1.5e-5, 2e-5, 3e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 5e-3, 2e-2)
_AGE_BUCKETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


class DispatchMetrics:
    """Everything one front end reports. Made once per process: see `dispatch_metrics`."""

    def __init__(self) -> None:
        engine = ("engine",)
        self._decisions = Counter(
            "gimbal_dispatch_decisions",
            "Requests sent, by engine, policy and reason of the choice",
            ("engine", "policy", "reason"),
        )
        self._seconds = Histogram(
            "gimbal_dispatch_decision_seconds",
            "Time of one dispatch decision, reading the board included",
            buckets=_DECISION_BUCKETS,
        )
        self._age = Histogram(
            "gimbal_signal_age_seconds",
            "Age of the oldest engine snapshot that mattered at a decision",
            buckets=_AGE_BUCKETS,
        )
        self._fallbacks = Counter(
            "gimbal_fallback", "Decisions left to a simpler rule", ("level", "reason")
        )
        self._level = Gauge(
            "gimbal_level_state",
            "1 on, 0 off, -1 switched itself off after repeated failures",
            ("level",),
            multiprocess_mode="min",
        )
        self._terms = Gauge(
            "gimbal_dispatch_cost_seconds",
            "Predicted cost of the latest decision, by engine and term",
            ("engine", "term"),
            multiprocess_mode="mostrecent",
        )
        self._unacked = Gauge(
            "gimbal_unacknowledged_tokens",
            "Prompt tokens sent and not yet taken by the engine",
            engine,
            multiprocess_mode="livesum",
        )
        self._inflight = Gauge(
            "gimbal_inflight_tokens",
            "Prompt tokens of unfinished requests",
            engine,
            multiprocess_mode="livesum",
        )
        self._recoveries = Counter("gimbal_board_recoveries", "Times the board's file was replaced")
        self._torn = Counter("gimbal_board_torn_reads", "Board rows that had to be copied again")
        self._signals = {
            field: Gauge(
                f"gimbal_engine_{_metric_name(field)}",
                f"Latest snapshot of the engine: {_metric_name(field).replace('_', ' ')}",
                engine,
                multiprocess_mode="mostrecent",
            )
            for field in Field
            if field not in (Field.TIMESTAMP_US, Field.EPOCH)
        }
        self._children: dict[tuple[int, str, str], Counter] = {}
        self._seen = {"recoveries": 0, "torn": 0}

    def decided(self, engine: int, policy: str, reason: str) -> None:
        """Counts one request sent to `engine`."""
        key = (engine, policy, reason)
        child = self._children.get(key)
        if child is None:
            child = self._children[key] = self._decisions.labels(str(engine), policy, reason)
        child.inc()

    def timed(self, seconds: float, signal_age_us: float) -> None:
        """One decision of Gimbal's: how long it took and how old its signals were."""
        self._seconds.observe(seconds)
        self._age.observe(signal_age_us / 1e6)

    def fell_back(self, level: str, reason: str) -> None:
        """Signature of ``LevelGuard.on_fallback``."""
        self._fallbacks.labels(level, reason).inc()

    def level_state(self, level: str, state: int) -> None:
        """1 on, 0 off, -1 switched itself off."""
        self._level.labels(level).set(state)

    def refresh(
        self,
        first: int,
        rows: FloatArray,
        unacked_tokens: FloatArray,
        inflight_tokens: FloatArray,
        decision: Decision | None,
    ) -> None:
        """Sets the gauges of the engines from rank `first` on; `rows` [engines, ROW_WIDTH]."""
        for index, row in enumerate(rows.tolist()):
            label = str(first + index)
            for field, gauge in self._signals.items():
                gauge.labels(label).set(row[field] * _scale(field))
            self._unacked.labels(label).set(unacked_tokens[index])
            self._inflight.labels(label).set(inflight_tokens[index])
        if decision is not None and decision.terms is not None:
            for name, values in zip(decision.term_names, decision.terms.tolist(), strict=True):
                for index, value in enumerate(values):
                    self._terms.labels(str(first + index), name).set(value / 1e6)

    def board_state(self, recoveries: int, torn: int) -> None:
        """Totals of the board since this process started."""
        for counter, key, total in (
            (self._recoveries, "recoveries", recoveries),
            (self._torn, "torn", torn),
        ):
            if total > self._seen[key]:
                counter.inc(total - self._seen[key])
                self._seen[key] = total


def _metric_name(field: Field) -> str:
    """Prometheus wants base units: ``STEP_TIME_US`` becomes ``step_time_seconds``."""
    name = field.name.lower().replace("_us_per_", "_seconds_per_")
    return f"{name[:-3]}_seconds" if name.endswith("_us") else name


def _scale(field: Field) -> float:
    return 1e-6 if field.name.endswith("_US") or "_US_PER_" in field.name else 1.0


@lru_cache(maxsize=1)
def dispatch_metrics() -> DispatchMetrics:
    """The process's metrics; a name can be registered only once."""
    return DispatchMetrics()
