"""Every contract between Gimbal's parts, in one short file.

Policies are pure: arrays and immutable records in, a decision out. Clock, randomness and I/O
are passed in by whoever runs them: the hooks in ``vllm_plugin`` and the engine model in ``sim``
run the same objects. Times are microseconds (``_us``) of one monotonic clock per host unless the
name says otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from gimbal.core.compiled import Kernel
from gimbal.core.snapshot import Field

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int32]


class DispatchRequest(NamedTuple):
    """What a dispatch policy may know of a request. Output length is unknown, as in production.

    Immutable; a tuple, because one is made per decision.
    """

    request_id: str
    prompt_tokens: int
    arrival_us: float
    session: str | None = None
    priority: int = 0
    domain: str | None = None  # topic, where the caller knows one (see core/feedback/affinity.py)
    loaded_tokens: int = 0  # of the prompt, what an engine loads from elsewhere, whichever it is


class EngineLoads(NamedTuple):
    """What the dispatcher knows at the moment it decides; one row per engine, in rank order.

    Immutable; a tuple, as `DispatchRequest`. Arrays are C-contiguous float64.

    Attributes:
        board: [engines, ROW_WIDTH] snapshots, columns named by `Field`.
        unacked_requests: [engines] sent by this front end and not yet in the snapshot's counters.
        unacked_tokens: [engines] their prompt tokens.
        inflight_requests: [engines] this front end's unfinished requests.
        inflight_tokens: [engines] prompt tokens of those.
        cached_tokens: [engines] tokens of this prompt the engine does not have to compute: those it
            is believed to have cached, or loads.
        age_us: [engines] for how long each engine has been silent when it should not have been.
        unacked_cached_tokens: [engines] of `unacked_tokens`, those believed cached there.
        client_count: API servers that share these engines.
        rotation: grows by one per decision; ties go to the first engine at or after it.
        prefix_reuse: share of recent prompt tokens that some engine had cached, 0 to 1.
        feedback_weight: multiplier of expert pressure; 0 where level `feedback` is off.
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
    feedback_weight: float = 0.0

    def column(self, field: Field) -> FloatArray:
        """[engines] view of one snapshot field."""
        return self.board[:, field]


class DispatchPolicy(Protocol):
    """Chooses the engine of a request: a cost per engine, lowest wins, ties by rotation.

    What else a policy can do it declares: one that names its ``term_names`` is a `TimedPolicy`.
    """

    def costs(self, request: DispatchRequest, loads: EngineLoads) -> FloatArray:
        """[engines] cost of sending `request` to each engine; units are the policy's own.

        Infinity keeps a request off an engine. NaN is an error.
        """
        ...


class TimedPolicy(DispatchPolicy, Protocol):
    """A policy whose cost is a sum of named times in microseconds.

    Metrics show its terms, and sessions stay where they were as far as it allows.

    Attributes:
        term_names: one name per row of `priced` but the last.
    """

    term_names: tuple[str, ...]

    def priced(self, request: DispatchRequest, loads: EngineLoads) -> FloatArray:
        """[terms + 1, engines] microseconds; the last row, their sum, is `costs`."""
        ...

    def session_bound_us(self, request: DispatchRequest, loads: EngineLoads, engine: int) -> float:
        """The most that `engine` may cost above the best and still keep its session's request."""
        ...


@dataclass(frozen=True, slots=True)
class QueuedRequest:
    """What a queue ordering may know of a waiting request.

    `arrival_s` is what vLLM tells equals apart by: when the engine queued it or, with
    ``--scheduling-policy priority``, when it came to the front end.
    """

    request_id: str
    arrival_s: float  # by the queue's clock, as QueueState.now_s
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


@dataclass(frozen=True, slots=True)
class OrderingTraits:
    """What a queue ordering can do. The queue goes without what is not declared.

    Attributes:
        dynamic: keys change while requests wait; the ordering has `DynamicOrdering.keys`.
        age_limit: who has waited longer than ``queue.max_wait_s`` may go first.
        shares_steps: a key is static and counts prefill tokens, so that a running prefill with r of
            its w tokens left competes with ``key - (w - r)`` (``queue.in_batch``).
        passes_blocked: a request may pass a head that gets no KV blocks (``queue.pass_steps``), and
            may be kept out of free ones (``queue.room_tokens``).
        sizes_steps: the prefill of a step may be cut (``queue.graph_steps``,
            ``queue.step_budget``): the order does not rely on steps being filled.
    """

    dynamic: bool = False
    age_limit: bool = False
    shares_steps: bool = False
    passes_blocked: bool = False
    sizes_steps: bool = False


NO_TRAITS = OrderingTraits()


class QueueOrdering(Protocol):
    """Orders waiting requests: smallest key first, ties by arrival, then by insertion.

    What else it can do it declares in an attribute ``traits`` (`OrderingTraits`; without one,
    nothing). One that can promise how long a request waits at most has a method
    ``bound_s(ahead_tokens, own_tokens, prefill_tokens_per_s)``.
    """

    def key(self, request: QueuedRequest, state: QueueState) -> float:
        """The request's key. Static keys are computed once, when the request is queued."""
        ...


def traits_of(ordering: QueueOrdering) -> OrderingTraits:
    """What `ordering` declares that it can do."""
    traits = getattr(ordering, "traits", NO_TRAITS)
    return traits if isinstance(traits, OrderingTraits) else NO_TRAITS


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
    """Plans which logical expert each physical slot holds. Deterministic bit for bit.

    Every rank builds its own and shows it the same windows. Its plans pass the gain gate, on a
    server as in the simulator, unless it declares ``gated = False``: one that has a gate of its
    own, or is a baseline that always rearranges. One that can plan for several kinds of step at
    once has a method ``plan_kinds(problems, kinds) -> PlacementPlan`` (`core.placement.kinds`).
    ``gimbal place --history`` shows earlier windows to one with a method ``learn(total)``,
    [layers, experts] pairs each.
    """

    def place(self, routing: RoutingCounts, topology: Topology, current: IntArray) -> IntArray:
        """Returns physical_to_logical [layers, slots]; `current` has the same shape."""
        ...


def argmin_rotating(costs: FloatArray | Sequence[float], rotation: int) -> int:
    """Index of the least cost; equal costs go to the first at or after `rotation` (mod n).

    A fixed tie-break would send every request of an idle server to rank 0 (vLLM PR #47420). Equal
    means up to one part in 10^9: vectorized sums of the same numbers may differ in the last bit.
    Raises ValueError unless all costs are numbers and the least is finite.
    """
    index: int = ARGMIN.call(np.array(costs, dtype=np.float64, order="C"), rotation)
    if index < 0:
        raise ValueError("costs are not numbers")
    return index


def _argmin(costs: FloatArray, rotation: int) -> int:
    """`argmin_rotating`, or -1 where that raises."""
    least = math.inf
    for cost in costs:
        if math.isnan(cost):
            return -1
        least = min(least, cost)
    if math.isinf(least):
        return -1
    limit, engines = least + abs(least) * 1e-9, len(costs)
    for turn in range(rotation, rotation + engines):
        if costs[turn % engines] <= limit:
            return turn % engines
    return -1


ARGMIN = Kernel(_argmin, "i8(f8[::1], i8)")
