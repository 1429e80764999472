"""What a page needs of a run's result: checked before anything is drawn from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from gimbal.core.numbers import MOST, MOST_COUNT
from gimbal.records.store import build

# The page prints what is there, so that text which reads as a number will not do.
Number = Annotated[float, Field(strict=True, ge=-MOST, le=MOST, allow_inf_nan=False)]
Whole = Annotated[int, Field(strict=True, ge=0, le=MOST_COUNT)]


@dataclass(frozen=True)
class _Ratio:
    ratio: Number | None
    low: Number | None
    high: Number | None
    differs: bool | None = None


@dataclass(frozen=True)
class _Statistics:
    mean: Number | None
    p50: Number | None
    p90: Number | None
    p99: Number | None


@dataclass(frozen=True)
class _RatioStatistics:
    mean: _Ratio
    p50: _Ratio
    p90: _Ratio
    p99: _Ratio


@dataclass(frozen=True)
class _Ratios:
    ttft_ms: _RatioStatistics
    tpot_ms: _RatioStatistics
    itl_ms: _RatioStatistics
    e2e_ms: _RatioStatistics
    throughput_rps: _Ratio
    output_tokens_per_s: _Ratio
    goodput_rps: _Ratio


@dataclass(frozen=True)
class _Balance:
    max_over_mean: Number | None


@dataclass(frozen=True)
class _Backlog:
    bounded: bool
    falls: bool
    growth: Number
    residence_p99_s: Number | None


@dataclass(frozen=True)
class _Window:
    begin_s: Number
    end_s: Number


@dataclass(frozen=True)
class _Arm:
    ttft_ms: _Statistics
    tpot_ms: _Statistics
    itl_ms: _Statistics
    e2e_ms: _Statistics
    throughput_rps: Number
    output_tokens_per_s: Number
    goodput_rps: Number
    requests: Whole
    completed: Whole
    rejected: Whole
    failed: Whole
    aborted: Whole
    balance: _Balance
    repeats: Whole = 1
    backlog: _Backlog | None = None


@dataclass(frozen=True)
class _Client:
    core_share: Number
    cpu_us_per_token: Number


@dataclass(frozen=True)
class _Result:
    arms: dict[str, _Arm]
    ratios: dict[str, _Ratios]
    rate_rps: Number | None = None
    load: Number | None = None
    capacity_rps: Number | None = None
    client: _Client | None = None
    window: _Window | None = None


def check_result(result: Mapping[str, Any], where: str) -> None:
    """Raises InputError that begins with `where` and names the key; more keys may be there."""
    build(_Result, result, where)
