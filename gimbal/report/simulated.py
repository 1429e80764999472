"""The report of simulated runs: what ``gimbal simulate --json`` prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from gimbal.records.schema import RequestRecord
from gimbal.report.compare import compare, nested
from gimbal.report.metrics import Slo, balance, summarize
from gimbal.report.window import Window, backlog_of

HANDOVER = ("prefill_ms", "kv_wait_ms")
"""Of clusters with prefill apart: the phases before a decode engine has a request's KV."""


class Run(Protocol):
    """What a report needs of one simulated run; see `gimbal.sim.cells.CellResult`."""

    @property
    def arm(self) -> str: ...
    @property
    def records(self) -> Sequence[RequestRecord]: ...
    @property
    def itl_ms(self) -> Mapping[str, float | None]: ...
    @property
    def requests_by_engine(self) -> Mapping[int, float]: ...
    @property
    def tokens_by_engine(self) -> Mapping[int, float]: ...
    @property
    def steps(self) -> int: ...
    @property
    def preemptions(self) -> int: ...
    @property
    def balance(self) -> float: ...
    @property
    def prefill_ms(self) -> Mapping[str, float | None] | None: ...
    @property
    def kv_wait_ms(self) -> Mapping[str, float | None] | None: ...


def report_of(
    runs: Sequence[Run],
    names: Sequence[str],
    base: str,
    slo: Slo,
    seed: int,
    window: Window | None = None,
) -> dict[str, Any]:
    """The report over `runs` of the arms `names`; ratios are to the arm `base`.

    Args:
        seed: of the first repeat.
        window: the measured part of every run; None measures whole runs.
    """
    by_arm = {name: [run for run in runs if run.arm == name] for name in names}
    ratios: dict[str, Any] = {}
    if len(names) > 1:
        records = {name: [list(run.records) for run in own] for name, own in by_arm.items()}
        intervals = compare(records, base, slo, window)
        ratios = {f"{name}/{base}": nested(metrics) for name, metrics in intervals.items()}
    return {
        "arms": {name: _summary(own, slo, window) for name, own in by_arm.items()},
        "ratios": ratios,
        "window": None if window is None else window.to_json(),
        "seed": seed,
        "slo": slo.limits(),
        "environment": {"simulated": True},
    }


def _summary(runs: Sequence[Run], slo: Slo, window: Window | None) -> dict[str, Any]:
    itl = [run.itl_ms for run in runs]
    records = [list(run.records) for run in runs]
    handover = {
        name: _mean_statistics([own for run in runs if (own := getattr(run, name)) is not None])
        for name in HANDOVER
    }
    return summarize(records, slo, window) | {
        "backlog": None if window is None else backlog_of(records, window).to_json(),
        "itl_ms": _mean_statistics(itl),
        **{name: values for name, values in handover.items() if values},
        "repeats": len(runs),
        "balance": balance(_sum([run.tokens_by_engine for run in runs])),
        "requests_by_engine": balance(_sum([run.requests_by_engine for run in runs])),
        "prefix_hit_rate": None,
        "client_core_share": 0.0,
        "expert_balance": _mean([run.balance for run in runs]),
        "preemptions": sum(run.preemptions for run in runs),
        "steps": sum(run.steps for run in runs),
    }


def _mean_statistics(repeats: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    """Of values pooled over repeats of about equal size: the mean of the repeats' statistics."""
    return {k: _mean([own[k] for own in repeats]) for k in repeats[0]} if repeats else {}


def _mean(values: Sequence[float | None]) -> float | None:
    present = [v for v in values if v is not None]
    return sum(present) / len(present) if present else None


def _sum(rows: Sequence[Mapping[int, float]]) -> dict[int, float]:
    return {engine: sum(row[engine] for row in rows) for engine in rows[0]}
