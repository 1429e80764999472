"""What a placement plan is made from, checked once at the door.

Counts are token-expert pairs of one window; `RoutingCounts.steps` turns them into pairs per step,
so every cost below is microseconds per step.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from gimbal.core.contracts import FloatArray, IntArray, RoutingCounts, Topology
from gimbal.core.errors import InputError
from gimbal.core.numbers import MOST, MOST_MULTIPLIER, real
from gimbal.core.placement.backends import BACKENDS, ROUTED_BACKEND
from gimbal.core.placement.forecast import Forecast

if TYPE_CHECKING:
    from gimbal.core.cost.profile import Profile


@dataclass(frozen=True, slots=True)
class CostConstants:
    """Constants of the placement objective; the defaults are Qwen3-30B-A3B in bf16 on H100.

    The MoE time of a rank is ``moe_fixed_us + ((us_per_active_expert * A)**p + (us_per_pair *
    P)**p)**(1/p) + us_per_gathered_token * G``: weight reads and matrix products overlap, p says
    how well. The defaults are our fit to NVIDIA AIConfigurator's measured vLLM 0.19 tables
    (commit 095f58a), mean absolute error 3.3 % on balanced and 5.6 to 7.1 % on skewed rows.

    Attributes:
        moe_fixed_us: kernel launches of one layer's experts.
        us_per_active_expert: reading one expert's weights.
        us_per_pair: matrix products of one token-expert pair.
        overlap_exponent: p above; 1 is no overlap, large p is the maximum of the two.
        us_per_gathered_token: alignment and activation, per token of the whole EP group.
        top_k: experts per token; G is pairs / top_k.
        bytes_per_pair: hidden state out and result back for one pair.
        same_rank_gbps, same_node_gbps, other_node_gbps: GB/s per rank and tier; infinite is free.
        expert_bytes: weights of one expert of one layer.
        migration_gbps: GB/s at which a rank receives experts.
        migration_fixed_us: per changed layer, whatever moves (0.72 s over 48 layers, measured
            for vLLM's synchronous rearrangement, is 15,000 us).
    """

    moe_fixed_us: float = 23.8
    us_per_active_expert: float = 3.285
    us_per_pair: float = 0.01478
    overlap_exponent: float = 1.74
    us_per_gathered_token: float = 0.0481
    top_k: int = 8
    bytes_per_pair: float = 8192.0
    same_rank_gbps: float = float("inf")
    same_node_gbps: float = 450.0
    other_node_gbps: float = 50.0
    expert_bytes: float = 9_437_184.0
    migration_gbps: float = 450.0
    migration_fixed_us: float = 15_000.0

    @property
    def moe(self) -> tuple[float, float, float, float, float]:
        """The last five arguments of `cost.step.rank_moe_us`."""
        return (
            self.moe_fixed_us,
            self.us_per_active_expert,
            self.us_per_pair,
            self.us_per_gathered_token,
            self.overlap_exponent,
        )

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if not value >= 0.0:
                raise InputError(f"cost constants: {name} must not be negative, got {value}")
        for name in ("same_rank_gbps", "same_node_gbps", "other_node_gbps", "migration_gbps"):
            if getattr(self, name) == 0.0:
                raise InputError(f"cost constants: {name} must be positive")
        if self.overlap_exponent < 1.0 or self.top_k < 1:
            raise InputError("cost constants: overlap_exponent and top_k must be at least 1")


def constants_of(profile: Profile) -> CostConstants:
    """A cost-model profile's constants for placement; a rank's own experts are reached free."""
    moe, wires = profile.moe, profile.interconnect
    return CostConstants(
        moe_fixed_us=moe.base_us,
        us_per_active_expert=moe.per_active_expert_us,
        us_per_pair=moe.per_pair_us,
        overlap_exponent=moe.norm,
        us_per_gathered_token=moe.per_group_token_us,
        top_k=profile.model.top_k,
        bytes_per_pair=4.0 * profile.model.hidden,  # bf16, there and back
        same_node_gbps=wires.same_node_bytes_per_us / 1e3,
        other_node_gbps=wires.other_node_bytes_per_us / 1e3,
        expert_bytes=float(profile.model.expert_bytes),
        migration_gbps=wires.migration_bytes_per_us / 1e3,
        migration_fixed_us=wires.migration_layer_us,
    )


def constants_for_model(
    base: CostConstants, expert_bytes: float, hidden_bytes: float, top_k: int
) -> CostConstants:
    """`base` for another model on the same machine.

    Reading an expert and multiplying by it are both proportional to its bytes.

    Args:
        expert_bytes: weights of one expert of one layer.
        hidden_bytes: one token's hidden state.
        top_k: experts per token.
    """
    scale = expert_bytes / base.expert_bytes
    return replace(
        base,
        us_per_active_expert=base.us_per_active_expert * scale,
        us_per_pair=base.us_per_pair * scale,
        expert_bytes=expert_bytes,
        bytes_per_pair=2.0 * hidden_bytes,
        top_k=top_k,
    )


@dataclass(frozen=True, slots=True)
class PlacementProblem:
    """One planning decision; construction raises InputError naming the bad array and index.

    Attributes:
        routing: the window to plan for, measured or forecast.
        topology: ranks, slots per rank, ranks per source and node.
        current: [layers, slots] physical_to_logical in force.
        constants: cost-model constants.
        alpha, beta, gamma: multipliers of load, communication and migration.
        horizon_steps: steps over which migration is amortized.
        backend: one of `BACKENDS`.
        forecast: how the window to plan for differs from the counts and how uncertain it is;
            None takes the counts as they are.
        max_received: experts that may change rank, all layers together; None is no limit.
        expert_groups: groups of consecutive experts that must share a node (group-limited
            routing); 1 is no constraint.
    """

    routing: RoutingCounts
    topology: Topology
    current: IntArray
    constants: CostConstants = field(default_factory=CostConstants)
    alpha: float = 1.0
    beta: float = 1.0
    gamma: float = 1.0
    horizon_steps: int = 3000
    backend: str = ROUTED_BACKEND
    forecast: Forecast | None = None
    max_received: int | None = None
    expert_groups: int = 1
    measured: FloatArray = field(init=False, repr=False)
    """[layers, experts] counts over all sources, as measured."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "measured", validate_counts(self.routing.counts, "counts"))
        validate_topology(self.topology, self.routing.counts.shape)
        validate_placement(self.current, self.topology, self.layers, self.experts, "current")
        _validate_options(self)

    @property
    def layers(self) -> int:
        return int(self.routing.counts.shape[1])

    @property
    def experts(self) -> int:
        return int(self.routing.counts.shape[2])

    def with_forecast(self, forecast: Forecast) -> PlacementProblem:
        """The same problem for the window `forecast` expects; counts are not checked again."""
        problem = copy.copy(self)
        _validate_forecast(problem, forecast)
        object.__setattr__(problem, "forecast", forecast)
        return problem

    @property
    def expected(self) -> FloatArray:
        """[layers, experts] counts over all sources in the window to plan for."""
        return self.measured if self.forecast is None else self.measured * self.forecast.factor

    @property
    def spread(self) -> FloatArray | None:
        """[layers, experts] standard deviation of `expected`, None when taken as certain."""
        return None if self.forecast is None else self.forecast.spread

    @property
    def communicates(self) -> bool:
        """False where bytes do not depend on placement, or nobody knows who asked."""
        known = self.routing.counts.shape[0] == self.topology.sources
        return self.backend == ROUTED_BACKEND and known

    @property
    def nodes(self) -> int:
        return -(-self.topology.ranks // self.topology.ranks_per_node)

    @property
    def group_locked(self) -> bool:
        """True when expert groups tie experts to nodes."""
        return self.expert_groups > 1 and self.nodes > 1


def _first(bad: np.ndarray) -> str:
    return "[" + ", ".join(str(int(i)) for i in np.argwhere(bad)[0]) + "]"


def validate_counts(counts: FloatArray, name: str) -> FloatArray:
    """Raises InputError unless `counts` is [sources, layers, experts], finite, not negative.

    Their sum over sources may be `numbers.MOST` at most: costs and squares of it stay finite.

    Returns the sum over sources, [layers, experts].
    """
    if counts.ndim != 3:
        raise InputError(
            f"{name}: expected [source, layer, expert], got {counts.ndim} dimension(s)"
        )
    if 0 in counts.shape:
        raise InputError(f"{name}: empty array of shape {counts.shape}")
    # Counts may be tens of megabytes: a plane at a time is still in the cache when it is read
    # again, and a sum is NaN or infinite when an element is.
    total, least = np.zeros(counts.shape[1:]), 0.0
    for plane in counts:
        total += plane
        least = min(least, plane.min())
    if not np.isfinite(total).all() and not (finite := np.isfinite(counts)).all():
        where = _first(~finite)
        raise InputError(f"{name}{where}: not finite ({counts[~finite][0]})")
    if least < 0:
        where = _first(counts < 0)
        raise InputError(f"{name}{where}: negative ({counts[counts < 0][0]:g})")
    if not (most := total.max()) <= MOST:
        raise InputError(f"{name}: {most:g} for one expert: expected a sum <= {MOST:g}")
    return total


def validate_topology(topology: Topology, shape: tuple[int, ...]) -> None:
    """Raises InputError when `topology` cannot serve counts of `shape` [S, L, E]."""
    t, (sources, _, experts) = topology, shape
    for name in ("ranks", "slots_per_rank", "ranks_per_source", "ranks_per_node"):
        if getattr(t, name) < 1:
            raise InputError(f"topology: {name} must be at least 1, got {getattr(t, name)}")
    if t.ranks % t.ranks_per_source:
        raise InputError(
            f"topology: ranks_per_source {t.ranks_per_source} does not divide {t.ranks} ranks"
        )
    if t.ranks > t.ranks_per_node and t.ranks_per_node % t.ranks_per_source:
        raise InputError(
            f"topology: {t.ranks_per_node} ranks per node cut a source of {t.ranks_per_source} "
            "ranks in two; a source must lie in one node"
        )
    if sources not in (1, t.sources):
        raise InputError(
            f"counts: axis 0 has {sources} sources, topology has {t.sources} "
            f"({t.ranks} ranks, {t.ranks_per_source} per source)"
        )
    if t.slots < experts:
        raise InputError(
            f"topology: {t.slots} slots ({t.ranks} ranks x {t.slots_per_rank}) cannot hold "
            f"{experts} experts"
        )
    if t.slots_per_rank > experts:
        raise InputError(
            f"topology: {t.slots_per_rank} slots per rank but only {experts} experts: replicas "
            "of one expert must lie on different ranks"
        )


def slots_per_rank(slots: int, ranks: int) -> int:
    """Slots divided evenly; raises InputError when they do not divide."""
    if ranks < 1:
        raise InputError(f"ranks: must be at least 1, got {ranks}")
    if slots % ranks:
        raise InputError(f"slots: {slots} slots do not divide over {ranks} ranks")
    return slots // ranks


def validate_placement(
    placement: IntArray, topology: Topology, layers: int, experts: int, name: str
) -> None:
    """Raises InputError unless `placement` is [layers, slots] and holds every expert."""
    if placement.ndim != 2 or not np.issubdtype(placement.dtype, np.integer):
        raise InputError(f"{name}: expected integers of shape [layer, slot]")
    if placement.shape != (layers, topology.slots):
        raise InputError(f"{name}: shape {placement.shape}, expected ({layers}, {topology.slots})")
    outside = (placement < 0) | (placement >= experts)
    if outside.any():
        where = _first(outside)
        raise InputError(f"{name}{where}: expert {placement[outside][0]} not in 0..{experts - 1}")
    present = np.zeros((layers, experts), dtype=bool)
    np.put_along_axis(present, placement.astype(np.intp), True, axis=1)
    if not present.all():
        layer, expert = (int(i) for i in np.argwhere(~present)[0])
        raise InputError(f"{name}[{layer}]: expert {expert} is missing")


def _validate_options(problem: PlacementProblem) -> None:
    p = problem
    for name in ("alpha", "beta", "gamma"):
        real(float(getattr(p, name)), f"{name}: ", 0.0, MOST_MULTIPLIER)
    if p.horizon_steps < 1:
        raise InputError(f"horizon_steps: must be at least 1, got {p.horizon_steps}")
    if p.routing.steps < 1:
        raise InputError(f"steps: must be at least 1, got {p.routing.steps}")
    if p.backend not in BACKENDS:
        raise InputError(f"backend: unknown {p.backend!r} (choose from {', '.join(BACKENDS)})")
    if p.max_received is not None and p.max_received < 0:
        raise InputError(f"max_received: must not be negative, got {p.max_received}")
    if p.expert_groups < 1 or p.experts % p.expert_groups:
        raise InputError(
            f"expert_groups: {p.expert_groups} groups do not divide {p.experts} experts"
        )
    active = p.routing.active
    if active is not None:
        if active.shape != p.routing.counts.shape:
            raise InputError(
                f"active: shape {active.shape}, expected {p.routing.counts.shape} as counts"
            )
        outside = ~((active >= 0) & (active <= 1))
        if outside.any():
            raise InputError(f"active{_first(outside)}: not a probability ({active[outside][0]})")
    if p.forecast is not None:
        _validate_forecast(p, p.forecast)


def _validate_forecast(p: PlacementProblem, forecast: Forecast) -> None:
    for name, array in (("factor", forecast.factor), ("spread", forecast.spread)):
        if array is None:
            continue
        if array.shape != (p.layers, p.experts):
            raise InputError(f"forecast {name}: shape {array.shape}, expected one per expert")
        bad = ~(np.isfinite(array) & (array >= 0))
        if bad.any():
            raise InputError(f"forecast {name}{_first(bad)}: must be finite and not negative")
