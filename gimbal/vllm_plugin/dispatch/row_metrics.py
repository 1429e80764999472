"""What engines count, as metrics of the front end; engines have no ``/metrics`` of their own.

A row's totals become counters. All API servers of a server read the same rows and Prometheus gets
the sum over them, so only the first one adds to the counters.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from prometheus_client import Counter, Gauge

from gimbal.core.contracts import FloatArray
from gimbal.core.snapshot import Field
from gimbal.vllm_plugin.metrics import MODEL

ENGINE: dict[Field, tuple[str, str]] = {
    Field.SEQUENCE: (
        "snapshots_total",
        "Snapshots that the engine has put on the signal board, about two a step",
    ),
    Field.WAITING_REQUESTS: ("waiting_requests", "Requests that wait in the engine's queue"),
    Field.WAITING_PREFILL_TOKENS: (
        "waiting_prefill_tokens",
        "Prompt tokens of waiting requests that the prefix cache did not hold when they came",
    ),
    Field.RUNNING_REQUESTS: ("running_requests", "Requests in the engine's running batch"),
    Field.RUNNING_PREFILL_TOKENS: (
        "running_prefill_tokens",
        "Prompt tokens that running requests still have to prefill",
    ),
    Field.DECODING_REQUESTS: ("decoding_requests", "Running requests whose prompt is done"),
    Field.KV_BLOCKS_USED: ("kv_blocks_used", "KV blocks that requests hold"),
    Field.KV_BLOCKS_TOTAL: ("kv_blocks", "KV blocks that the engine has, used or free"),
    Field.KV_BLOCK_TOKENS: ("kv_block_tokens", "Tokens that one KV block holds"),
    Field.PREEMPTIONS: ("preemptions_total", "Requests preempted for want of KV memory"),
    Field.STEP_TIME_US: ("step_time_seconds", "Recent duration of one engine step, smoothed"),
    Field.STEP_BASE_US: (
        "step_base_seconds",
        "Learned duration of a step without prefill at the present decode batch",
    ),
    Field.PREFILL_US_PER_TOKEN: (
        "prefill_seconds_per_token",
        "Learned time that one more prefill token adds to a step",
    ),
    Field.PREFILL_TOKENS_PER_S: (
        "prefill_tokens_per_second",
        "Recent throughput of prefill, smoothed",
    ),
    Field.STEP_TOKEN_BUDGET: (
        "step_budget_tokens",
        "Most tokens that one step may schedule (max_num_batched_tokens)",
    ),
    Field.EXPERT_PRESSURE_US: (
        "expert_pressure_seconds",
        "Time per step that the engine's requests cost by where their experts lie",
    ),
    Field.RUNNING_TOKENS: ("running_tokens", "Context tokens that running requests hold"),
    Field.PENDING_PREFIX_HIT_TOKENS: (
        "pending_prefix_hit_tokens",
        "Prompt tokens of waiting requests that the prefix cache holds",
    ),
    Field.AWAITED_KV_TOKENS: (
        "awaited_kv_tokens",
        "Prompt tokens that a KV connector will load for waiting requests without KV blocks",
    ),
    Field.LOADED_KV_TOKENS: (
        "loaded_kv_tokens",
        "Tokens in KV blocks that waiting requests hold, on their way from elsewhere or there",
    ),
    Field.LOADING_REQUESTS: (
        "loading_requests",
        "Waiting requests that a KV connector loads for, or will",
    ),
    Field.MAX_RUNNING_REQUESTS: (
        "max_running_requests",
        "Most requests that may run at once (max_num_active_seqs or max_num_seqs)",
    ),
    Field.DECODE_US_PER_REQUEST: (
        "decode_seconds_per_request",
        "Learned time that one more decoding request adds to a step",
    ),
    Field.STEP_PREFILL_TOKENS: (
        "step_prefill_tokens",
        "Prefill tokens of the step that runs now",
    ),
    Field.STEP_PREFILL_DEPTH_TOKENS: (
        "step_prefill_depth_tokens",
        "Context before a prefill token of the step that runs now, on average",
    ),
    Field.STEP_TOKENS: ("step_tokens", "Prefill and decode tokens of the step that runs now"),
    Field.QUEUE_OVERTAKES: (
        "queue_overtakes_total",
        "Requests admitted before one that was queued earlier",
    ),
    Field.QUEUE_PROMOTIONS: (
        "queue_promotions_total",
        "Requests admitted because they had waited past max_wait_s",
    ),
    Field.QUEUE_KV_PASSES: (
        "queue_kv_passes_total",
        "Times that a request was offered ahead of a head without KV blocks",
    ),
    Field.QUEUE_YIELDS: (
        "queue_yields_total",
        "Steps in which a running prefill left budget to shorter newcomers",
    ),
    Field.QUEUE_GRAPH_STEPS: (
        "queue_graph_steps_total",
        "Steps whose prefill was cut to what a CUDA graph covers",
    ),
    Field.QUEUE_OLDEST_WAIT_US: (
        "queue_oldest_wait_seconds",
        "Longest wait of a request that waits now",
    ),
    Field.QUEUE_OLDEST_BOUND_US: (
        "queue_oldest_bound_seconds",
        "Wait that the ordering promised that request when it came; 0 without a bound",
    ),
    Field.QUEUE_FALLBACKS: (
        "queue_fallbacks_total",
        "Times that the queue level left the engine to vLLM's behaviour",
    ),
    Field.PLACEMENT_FALLBACKS: (
        "placement_fallbacks_total",
        "Times that the placement level left the engine's worker to vLLM's behaviour",
    ),
    Field.QUEUE_OFF: ("queue_off", "1 since the engine's queue level has switched itself off"),
    Field.PLACEMENT_OFF: (
        "placement_off",
        "1 since the placement level of the engine's worker has switched itself off",
    ),
    Field.SIGNAL_FALLBACKS: (
        "signal_fallbacks_total",
        "Events that the engine's own accounts missed and were counted anew after",
    ),
    Field.IDLE: (
        "idle",
        "1 while the engine has nothing to run, though requests may wait; it says nothing then",
    ),
    Field.PLACEMENT_STALL_US: (
        "placement_stall_seconds_total",
        "Serving time that rearrangements of experts have taken from the engine",
    ),
}
"""Metrics ``gimbal_engine_NAME`` with their HELP, one series an engine; a total is a counter."""

SERVER: tuple[tuple[str, str, tuple[Field, ...]], ...] = (
    (
        "proposals_total",
        "Rearrangements of experts that were planned, whether they were put in force or not",
        (Field.PLACEMENT_PROPOSALS,),
    ),
    (
        "commits_total",
        "Rearrangements of experts that all ranks have put in force",
        (Field.PLACEMENT_COMMITS,),
    ),
    (
        "moved_experts_total",
        "Experts of one layer that a rearrangement brought to a rank that had not held them",
        (Field.PLACEMENT_RECEIVED_EXPERTS,),
    ),
    (
        "moved_bytes_total",
        "Expert weights that rearrangements brought to other ranks",
        (Field.PLACEMENT_RECEIVED_BYTES,),
    ),
    (
        "predicted_gain_seconds",
        "Time per step that the latest rearrangement was predicted to save; negative for a loss",
        (Field.PLACEMENT_PREDICTED_GAIN_US, Field.PLACEMENT_PREDICTED_LOSS_US),
    ),
    (
        "realized_gain_seconds",
        "Time per step that a rearrangement saved, priced on the load that followed it; the latest "
        "one that was priced",
        (Field.PLACEMENT_REALIZED_GAIN_US, Field.PLACEMENT_REALIZED_LOSS_US),
    ),
    (
        "balance_ratio",
        "Mean over busiest rank's expert load, averaged over layers; 1 is even, 0 not known yet",
        (Field.PLACEMENT_BALANCE,),
    ),
    (
        "local_share_ratio",
        "Share of token-expert pairs served on their source's own ranks; 0 where not known",
        (Field.PLACEMENT_LOCAL_SHARE,),
    ),
)
"""Metrics ``gimbal_placement_NAME`` of the whole server, HELP, and columns of the row: what the
second one holds is taken from the first. All ranks plan alike, so the row that knows of the most
proposals is the newest."""


class RowMetrics:
    """Gauges and counters from the rows of a front end's engines. Once per process."""

    def __init__(self) -> None:
        labels = (MODEL, "engine")
        made = [
            (field, _family(f"gimbal_engine_{name}", text, labels))
            for field, (name, text) in ENGINE.items()
        ]
        self._gauges = _Columns([each for each in made if isinstance(each[1], Gauge)])
        self._counters = _Columns([each for each in made if not isinstance(each[1], Gauge)])
        self._server = [
            (_family(f"gimbal_placement_{name}", text, (MODEL,)), fields)
            for name, text, fields in SERVER
        ]
        self._counts = True
        self._model = ""
        self._forget()

    def _forget(self) -> None:
        """What has been counted: of every engine, by column; and of the server."""
        self._seen = np.zeros((0, len(self._counters.fields)))
        self._epochs = np.zeros(0)
        self._seen_of_server: dict[Field, float] = {}

    def serve(self, model: str, engines: range, counts: bool) -> None:
        """Makes every series; `counts` is True in the first API server of a server."""
        self._model, self._counts = model, counts
        self._forget()  # another server of this process, with engines of its own
        for columns in (self._gauges, self._counters):
            columns.serve(model, engines)
        for family, _ in self._server:
            family.labels(model)

    def count(self, first: int, rows: FloatArray) -> None:
        """Adds what the engines from rank `first` on have counted since; `rows` as in `show`."""
        if not self._counts or not len(rows):
            return
        missing = len(rows) - len(self._seen)
        if missing > 0:  # an elastic server has grown
            self._seen = np.pad(self._seen, ((0, missing), (0, 0)))
            self._epochs = np.pad(self._epochs, (0, missing))
        seen, epochs = self._seen[: len(rows)], self._epochs[: len(rows)]
        known, epoch = rows[:, Field.SEQUENCE] > 0.0, rows[:, Field.EPOCH]
        seen[known & (epochs != epoch)] = 0.0  # an engine that was started anew begins at 0 again
        epochs[known] = epoch[known]
        totals = rows[:, self._counters.fields]
        more = np.where(known[:, None], totals - seen, 0.0) * self._counters.scales
        for index, column in np.argwhere(more > 0.0).tolist():
            self._counters.of(first + index)[column].inc(float(more[index, column]))
        np.maximum(seen, totals, out=seen, where=known[:, None])
        row = _newest(rows)
        for family, (field, *_) in self._server:
            added = float(row[field]) - self._seen_of_server.get(field, 0.0)
            if not isinstance(family, Gauge) and added > 0.0:
                self._seen_of_server[field] = float(row[field])
                family.labels(self._model).inc(added * _scale(field))

    def show(self, first: int, rows: FloatArray, part: slice = slice(None)) -> None:
        """Sets the gauges of the engines `part` of `rows` [engines, ROW_WIDTH], whose first has
        rank `first`."""
        values = (rows[part][:, self._gauges.fields] * self._gauges.scales).tolist()
        for engine, shown in zip(range(first, first + len(rows))[part], values, strict=True):
            for child, value in zip(self._gauges.of(engine), shown, strict=True):
                child.set(value)
        for family, (field, *loss) in self._server if len(rows) else ():
            if isinstance(family, Gauge):
                row = _newest(rows)
                lost = row[loss[0]] if loss else 0.0
                family.labels(self._model).set((row[field] - lost) * _scale(field))


class _Columns:
    """Columns of a row, and the children that show them, engine by engine."""

    def __init__(self, families: list[tuple[Field, Any]]) -> None:
        self.fields = [int(field) for field, _ in families]
        self.scales = np.array([_scale(field) for field, _ in families])
        self._families = [family for _, family in families]
        self._model = ""
        self._children: dict[int, list[Any]] = {}

    def serve(self, model: str, engines: range) -> None:
        """Makes the series of `engines`, at 0 where they are new."""
        self._model, self._children = model, {}
        for engine in engines:
            self.of(engine)

    def of(self, engine: int) -> list[Any]:
        """One child per column."""
        found = self._children.get(engine)
        if found is None:
            found = [family.labels(self._model, str(engine)) for family in self._families]
            self._children[engine] = found
        return found


def _newest(rows: FloatArray) -> FloatArray:
    """The row that knows of the most rearrangements."""
    row: FloatArray = rows[rows[:, Field.PLACEMENT_PROPOSALS].argmax()]
    return row


def _family(name: str, text: str, labels: tuple[str, ...]) -> Any:
    if name.endswith("_total"):
        return Counter(name, text, labels)
    return Gauge(name, text, labels, multiprocess_mode="mostrecent")


def _scale(field: Field) -> float:
    """Prometheus wants seconds."""
    return 1e-6 if field.name.endswith("_US") or "_US_PER_" in field.name else 1.0
