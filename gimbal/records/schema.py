"""The record types. One run is a directory; each type is one JSON-lines file in it.

Times are seconds since the run's start unless a name says otherwise. A simulated run and a live
run fill the same fields, so a report never asks which one it reads.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class RunInfo:
    """What a run was: enough to repeat it. Written to ``run.json``."""

    kind: str  # bench | simulate
    command: tuple[str, ...]
    seed: int
    repeats: int
    trace: dict[str, Any]  # name, requests, rate, options
    arms: dict[str, dict[str, Any]]  # name -> flags and configuration, in the order asked for
    environment: dict[str, Any]  # machine, versions, time
    slo: dict[str, float] = field(default_factory=dict)
    runs: tuple[dict[str, Any], ...] = ()  # arm, repeat, start and client cost, in order of time
    result: dict[str, Any] | None = None  # what --json printed


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One request as its client saw it."""

    request_id: str
    arm: str
    repeat: int
    arrival_s: float  # when the trace says it arrives
    sent_s: float  # when the client really sent it
    prompt_tokens: int
    output_tokens: int  # received
    expected_output_tokens: int
    first_token_s: float | None
    last_token_s: float | None
    token_times_s: tuple[float, ...] = ()  # one per streamed token, empty unless kept
    engine: int | None = None
    session: str | None = None
    domain: str | None = None
    status: str = "ok"  # ok | rejected | failed | aborted
    error: str | None = None
    index: int = 0  # position in the repeat's trace: the same request in every arm


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One lock-step engine step, in a server's own ``steps-ENGINE.jsonl`` (key `step_records`)."""

    time_s: float
    engine: int
    duration_us: float
    prefill_tokens: int
    decode_requests: int
    waiting_requests: int
    waiting_prefill_tokens: int
    kv_usage: float
    context_tokens: int = 0  # held by running requests after the step
    prefill_pairs: float = 0.0  # sum over prefill chunks of n * (p + n/2), p computed before


@dataclass(frozen=True, slots=True)
class RebalanceRecord:
    """One expert rearrangement, proposed or committed."""

    time_s: float
    committed: bool
    reason: str
    predicted_gain_us_per_step: float
    predicted_stall_us: float
    realized_gain_us_per_step: float | None
    stall_us: float | None
    moved_slots: int
    received_experts: int
    balance_before: float
    balance_after: float
    local_share_before: float | None
    local_share_after: float | None
    arm: str = ""  # empty in a server's own file: it does not know what a benchmark calls it
    repeat: int = 0


@dataclass(frozen=True, slots=True)
class PlacementRecord:
    """Who asked for which expert, and which rank held it before and after a rearrangement.

    Rows are layers, columns experts; a rank is that of the expert's first replica.
    """

    time_s: float
    committed: bool
    pairs: tuple[tuple[float, ...], ...]  # over the layer's mean
    ranks_before: tuple[tuple[int, ...], ...]
    ranks_after: tuple[tuple[int, ...], ...]
    arm: str = ""
    repeat: int = 0
