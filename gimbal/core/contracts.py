"""Every contract between Gimbal's parts, in one short file.

Policies are pure: arrays and frozen dataclasses in, a decision out. Clock, randomness and I/O
are passed in by whoever runs them: the hooks in ``vllm_plugin`` and the engine model in ``sim``
run the same objects. Times are microseconds (``_us``) of one monotonic clock per host unless the
name says otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int32]

MAX_FRONT_ENDS = 16
"""API server processes that one board can tell apart."""


class Field(IntEnum):
    """Columns of one engine's snapshot row. All are float64: integers below 2**53 stay exact."""

    SEQUENCE = 0  # snapshots published so far: about two a step
    TIMESTAMP_US = 1  # CLOCK_MONOTONIC when the snapshot was taken
    EPOCH = 2  # changes when the engine process is a new one: its counters restarted
    WAITING_REQUESTS = 3
    WAITING_PREFILL_TOKENS = 4  # uncached prompt tokens of waiting requests
    RUNNING_REQUESTS = 5
    RUNNING_PREFILL_TOKENS = 6  # prompt tokens that running requests still have to prefill
    DECODING_REQUESTS = 7  # running requests whose prompt is done
    KV_BLOCKS_USED = 8
    KV_BLOCKS_TOTAL = 9
    KV_BLOCK_TOKENS = 10
    PREEMPTIONS = 11  # since the engine started
    STEP_TIME_US = 12  # recent time of one step, smoothed
    STEP_BASE_US = 13  # learned: a step's time without prefill at the present decode batch
    PREFILL_US_PER_TOKEN = 14  # learned: what one more prefill token adds to a step
    PREFILL_TOKENS_PER_S = 15  # recent throughput, smoothed
    STEP_TOKEN_BUDGET = 16  # max_num_batched_tokens
    EXPERT_PRESSURE_US = 17  # per step, what this engine's requests cost by where experts lie
    RUNNING_TOKENS = 18  # context tokens held by running requests
    PENDING_PREFIX_HIT_TOKENS = 19  # prompt tokens of waiting requests the prefix cache holds
    MAX_RUNNING_REQUESTS = 20  # max_num_active_seqs, or max_num_seqs without it
    DECODE_US_PER_REQUEST = 21  # learned: what one more decoding request adds to a step
    STEP_PREFILL_TOKENS = 22  # prefill tokens of the step that runs now
    QUEUE_OVERTAKES = 23  # requests admitted before one that was queued earlier
    QUEUE_PROMOTIONS = 24  # requests admitted because they had waited past the absolute limit
    QUEUE_KV_PASSES = 25  # times a request was offered ahead of a head without KV blocks
    QUEUE_YIELDS = 26  # steps in which a running prefill left budget to shorter newcomers
    QUEUE_OLDEST_WAIT_US = 27  # longest wait of a request that waits now
    QUEUE_OLDEST_BOUND_US = 28  # what the ordering's bound allowed it, when it came; 0: no bound
    QUEUE_FALLBACKS = 29  # times the queue level fell back to vLLM's behaviour
    PLACEMENT_FALLBACKS = 30  # the same of the placement level, in the worker that answers
    QUEUE_GRAPH_STEPS = 31  # steps whose prefill was cut to what a CUDA graph covers
    STEP_TOKENS = 32  # all tokens of the step that runs now


SNAPSHOT_FIELDS = 36
"""Width reserved for `Field`; the accepted counters follow it in a row."""
ACCEPTED_REQUESTS = SNAPSHOT_FIELDS
"""First of MAX_FRONT_ENDS columns: requests accepted from front end f since EPOCH."""
ACCEPTED_TOKENS = ACCEPTED_REQUESTS + MAX_FRONT_ENDS
"""First of MAX_FRONT_ENDS columns: prompt tokens accepted from front end f since EPOCH."""
ROW_WIDTH = ACCEPTED_TOKENS + MAX_FRONT_ENDS


@dataclass(frozen=True, slots=True)
class DispatchRequest:
    """What a dispatch policy may know of a request. Output length is unknown, as in production."""

    request_id: str
    prompt_tokens: int
    arrival_us: float
    session: str | None = None
    priority: int = 0
    domain: str | None = None  # topic, where the caller knows one (see core/feedback/affinity.py)


class EngineLoads(NamedTuple):
    """What the dispatcher knows at the moment it decides; one row per engine, in rank order.

    Immutable; a tuple, because one is made per decision. Arrays are C-contiguous float64.

    Attributes:
        board: [engines, ROW_WIDTH] snapshots, columns named by `Field`.
        unacked_requests: [engines] sent by this front end and not yet in the snapshot's counters.
        unacked_tokens: [engines] their prompt tokens.
        inflight_requests: [engines] this front end's unfinished requests.
        inflight_tokens: [engines] prompt tokens of those.
        cached_tokens: [engines] tokens of this prompt the engine is believed to have cached.
        age_us: [engines] for how long each engine has been silent when it should not have been.
        unacked_cached_tokens: [engines] of `unacked_tokens`, those believed cached there.
        client_count: API servers that share these engines.
        rotation: grows by one per decision; ties go to the first engine at or after it.
        prefix_reuse: share of recent prompt tokens that some engine had cached, 0 to 1.
    """

    board: FloatArray
    unacked_requests: FloatArray
    unacked_tokens: FloatArray
    inflight_requests: FloatArray
    inflight_tokens: FloatArray
    cached_tokens: FloatArray
    age_us: FloatArray
    unacked_cached_tokens: FloatArray
    client_count: int = 1
    rotation: int = 0
    prefix_reuse: float = 0.0

    def column(self, field: Field) -> FloatArray:
        """[engines] view of one snapshot field."""
        return self.board[:, field]


class DispatchPolicy(Protocol):
    """Chooses the engine of a request: a cost per engine, lowest wins, ties by rotation."""

    def costs(self, request: DispatchRequest, loads: EngineLoads) -> FloatArray:
        """[engines] cost of sending `request` to each engine; units are the policy's own."""
        ...


@dataclass(frozen=True, slots=True)
class QueuedRequest:
    """What a queue ordering may know of a waiting request."""

    request_id: str
    arrival_s: float
    uncached_tokens: int
    priority: int = 0
    served_before_tokens: float = 0.0  # QueueState.served_tokens when this one was queued


@dataclass(frozen=True, slots=True)
class QueueState:
    """The engine's condition when a request is queued or the queue re-ordered."""

    now_s: float
    prefill_tokens_per_s: float
    waiting_requests: int
    waiting_tokens: int
    served_tokens: float = 0.0  # prefill work admitted since the engine started


class QueueOrdering(Protocol):
    """Orders waiting requests: smallest key first, ties by arrival, then by insertion."""

    def key(self, request: QueuedRequest, state: QueueState) -> float:
        """The request's key. Static keys are computed once, when the request is queued."""
        ...


@runtime_checkable
class DynamicOrdering(QueueOrdering, Protocol):
    """An ordering whose keys change while requests wait: re-sorted before each scheduling pass."""

    def keys(self, requests: Sequence[QueuedRequest], state: QueueState) -> list[float] | None:
        """One key per request, or None when the keys of the previous pass still hold."""
        ...


@dataclass(frozen=True, slots=True)
class RoutingCounts:
    """Routed tokens by source engine, layer and logical expert over one window.

    Attributes:
        counts: [sources, layers, experts] token-expert pairs.
        active: [sources, layers, experts] probability that a step of this source activates the
            expert at least once, or None when it was not recorded.
        steps: engine steps in the window.
    """

    counts: FloatArray
    active: FloatArray | None = None
    steps: int = 1


@dataclass(frozen=True, slots=True)
class Topology:
    """Where expert slots live. Rank r owns slots r*slots_per_rank to (r+1)*slots_per_rank - 1.

    Attributes:
        ranks: EP ranks.
        slots_per_rank: physical experts per rank and layer.
        ranks_per_source: EP ranks of one DP engine (its TP size); rank r belongs to source
            r // ranks_per_source.
        ranks_per_node: EP ranks that share a node.
    """

    ranks: int
    slots_per_rank: int
    ranks_per_source: int = 1
    ranks_per_node: int = 8

    @property
    def slots(self) -> int:
        return self.ranks * self.slots_per_rank

    @property
    def sources(self) -> int:
        return self.ranks // self.ranks_per_source


class Placer(Protocol):
    """Plans which logical expert each physical slot holds. Deterministic bit for bit."""

    def place(self, routing: RoutingCounts, topology: Topology, current: IntArray) -> IntArray:
        """Returns physical_to_logical [layers, slots]; `current` has the same shape."""
        ...


def argmin_rotating(costs: FloatArray | Sequence[float], rotation: int) -> int:
    """Index of the least cost; equal costs go to the first at or after `rotation` (mod n).

    A fixed tie-break would send every request of an idle server to rank 0 (vLLM PR #47420). Equal
    means up to one part in 10^9: vectorized sums of the same numbers may differ in the last bit.
    """
    values = costs.tolist() if isinstance(costs, np.ndarray) else list(costs)
    start = rotation % len(values)
    turned = values[start:] + values[:start]
    least = min(turned)
    limit = least + abs(least) * 1e-9
    for step, value in enumerate(turned):
        if value <= limit:
            return (start + step) % len(values)
    raise ValueError("costs are not numbers")
