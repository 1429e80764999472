"""The trace: one frozen row per request, in order of arrival."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from gimbal.core.numbers import MOST_REQUESTS

if TYPE_CHECKING:
    from gimbal.workloads.scenario import Scenario


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request of a workload.

    Attributes:
        arrival_s: seconds since the trace's start.
        prompt_tokens: prompt length.
        output_tokens: tokens to generate.
        session: conversation the request belongs to, if the trace says so.
        domain: topic the prompt's tokens are drawn from, if the trace says so.
        prefix_blocks: hash ids of the prompt's leading blocks; two requests share exactly the
            leading blocks whose ids agree. The block size is the trace's.
    """

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    session: str | None = None
    domain: str | None = None
    prefix_blocks: tuple[int, ...] = ()


@dataclass(frozen=True)
class Trace:
    """Requests in order of arrival.

    Attributes:
        name: what reports call it.
        requests: in order of `arrival_s`.
        prefix_block_tokens: tokens of one entry of `TraceRequest.prefix_blocks`; 0 without them.
        has_arrivals: False for a set of lengths whose arrivals must come from a generator.
        notes: what its reader assumed, a sentence each.
        scenario: what it was generated from; a run then has its own generated, of any length.
    """

    name: str
    requests: tuple[TraceRequest, ...]
    prefix_block_tokens: int = 0
    has_arrivals: bool = True
    notes: tuple[str, ...] = ()
    scenario: Scenario | None = None

    def __len__(self) -> int:
        return len(self.requests)

    @cached_property
    def arrivals_s(self) -> npt.NDArray[np.float64]:
        """[requests] arrival times."""
        return np.array([r.arrival_s for r in self.requests])

    @cached_property
    def prompt_tokens(self) -> npt.NDArray[np.int64]:
        """[requests] prompt lengths."""
        return np.array([r.prompt_tokens for r in self.requests], dtype=np.int64)

    @cached_property
    def output_tokens(self) -> npt.NDArray[np.int64]:
        """[requests] output lengths."""
        return np.array([r.output_tokens for r in self.requests], dtype=np.int64)

    @property
    def most_requests(self) -> int:
        """Requests that a run can take from it."""
        return len(self) if self.has_arrivals and self.scenario is None else MOST_REQUESTS

    @property
    def span_s(self) -> float:
        """Seconds from the first to the last arrival."""
        if not self.requests:
            return 0.0
        return self.requests[-1].arrival_s - self.requests[0].arrival_s

    @property
    def rate_rps(self) -> float:
        """Mean arrival rate: (requests - 1) / span, the inverse of the mean gap; 0 if undefined."""
        return (len(self.requests) - 1) / self.span_s if self.span_s > 0 else 0.0


def make_trace(
    name: str,
    requests: list[TraceRequest],
    prefix_block_tokens: int = 0,
    has_arrivals: bool = True,
    notes: tuple[str, ...] = (),
) -> Trace:
    """Sorts by arrival (stable) and moves the first arrival to zero."""
    ordered = sorted(requests, key=lambda r: r.arrival_s)
    start = ordered[0].arrival_s if ordered else 0.0
    shifted = tuple(
        TraceRequest(
            r.arrival_s - start,
            r.prompt_tokens,
            r.output_tokens,
            r.session,
            r.domain,
            r.prefix_blocks,
        )
        for r in ordered
    )
    return Trace(name, shifted, prefix_block_tokens, has_arrivals, notes)
