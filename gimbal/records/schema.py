"""The record types. One run is a directory; each type is one JSON-lines file in it.

Times are seconds since the run's start unless a name says otherwise. A simulated run and a live
run fill the same fields, so a report never asks which one it reads.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Field

from gimbal.core.numbers import MOST_RANKS, MOST_REQUESTS
from gimbal.core.options import Count, Finite, NotNegative

# What a field may hold when it is read back; whoever fills a record is not checked.
Rank = Annotated[int, Field(ge=0, lt=MOST_RANKS)]
Index = Annotated[int, Field(ge=0, le=MOST_REQUESTS)]


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
    repeat: Index
    arrival_s: Finite  # when the trace says it arrives
    sent_s: Finite  # when the client really sent it
    prompt_tokens: Count
    output_tokens: Count  # received
    expected_output_tokens: Count
    first_token_s: Finite | None
    last_token_s: Finite | None
    token_times_s: tuple[Finite, ...] = ()  # one per streamed token, empty unless kept
    engine: Rank | None = None
    session: str | None = None
    domain: str | None = None
    status: str = "ok"  # ok | rejected | failed | aborted
    error: str | None = None
    index: Index = 0  # position in the repeat's trace: the same request in every arm


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One lock-step engine step, in a server's own ``steps-ENGINE.jsonl`` (key `step_records`)."""

    time_s: Finite
    engine: Rank
    duration_us: NotNegative
    prefill_tokens: Count
    decode_requests: Count
    waiting_requests: Count
    waiting_prefill_tokens: Count
    kv_usage: NotNegative
    context_tokens: Count = 0  # held by running requests after the step
    prefill_pairs: NotNegative = 0.0  # sum over prefill chunks of n * (p + n/2), p computed before


@dataclass(frozen=True, slots=True)
class RebalanceRecord:
    """One expert rearrangement, proposed or committed."""

    time_s: Finite
    committed: bool
    reason: str
    predicted_gain_us_per_step: Finite
    predicted_stall_us: Finite
    realized_gain_us_per_step: Finite | None
    stall_us: Finite | None
    moved_slots: Count
    received_experts: Count
    balance_before: Finite
    balance_after: Finite
    local_share_before: Finite | None
    local_share_after: Finite | None
    arm: str = ""  # empty in a server's own file: it does not know what a benchmark calls it
    repeat: Index = 0


@dataclass(frozen=True, slots=True)
class PlacementRecord:
    """Who asked for which expert, and which rank held it before and after a rearrangement.

    Rows are layers, columns experts; a rank is that of the expert's first replica.
    """

    time_s: Finite
    committed: bool
    pairs: tuple[tuple[NotNegative, ...], ...]  # over the layer's mean
    ranks_before: tuple[tuple[Rank, ...], ...]
    ranks_after: tuple[tuple[Rank, ...], ...]
    arm: str = ""
    repeat: Index = 0
