"""One decision: what core's placer proposes for these counts and whether its gate lets it pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gimbal.core.config import PlacementConfig
from gimbal.core.contracts import IntArray, Placer, RoutingCounts, Topology
from gimbal.core.cost.profile import load_profile
from gimbal.core.feedback.pressure import wire_us_per_pair
from gimbal.core.placement import PLACERS, gate, heuristic
from gimbal.core.placement.backends import GATHER_BACKEND, ROUTED_BACKEND
from gimbal.core.placement.kinds import MEAN_STEP, StepKind, at_kind, mixed
from gimbal.core.placement.problem import (
    CostConstants,
    PlacementProblem,
    constants_for_model,
    constants_of,
)
from gimbal.core.placement.replica_split import near_split
from gimbal.core.placement.verify import answer


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a model and its server fix for planning.

    Attributes:
        expert_bytes: weights of one expert of one layer.
        top_k: experts per token.
        hidden_bytes: one token's hidden state.
        on_cpu: the workers compute on CPU.
        all2all_backend: vLLM's ``--all2all-backend``.
        step_interval: steps between rearrangements.
    """

    expert_bytes: float
    top_k: int
    hidden_bytes: float
    on_cpu: bool
    all2all_backend: str
    step_interval: int


@dataclass(frozen=True, slots=True)
class PlacementDecision:
    """One proposal and what it is predicted to do; times are microseconds.

    Attributes:
        placement: [layers, slots] the proposal.
        commit: what the gate says.
        reason: one clause for records and logs.
    """

    placement: IntArray
    commit: bool
    reason: str
    gain_us_per_step: float
    stall_us: float
    modelled_stall_us: float  # before correction
    moved_slots: int
    received_experts: int
    balance_before: float
    balance_after: float
    local_share_before: float
    local_share_after: float


GPU_PROFILE, CPU_PROFILE = "h100-qwen3-30b-a3b", "cpu-demo"
"""Packaged cost profiles that are taken when the configuration names none."""


def cost_constants(facts: ModelFacts, profile: str = "") -> CostConstants:
    """Constants of a cost profile (a packaged name or a file), scaled to this model.

    Raises InputError for a profile that does not exist or is malformed.
    """
    base = constants_of(load_profile(profile or (CPU_PROFILE if facts.on_cpu else GPU_PROFILE)))
    return constants_for_model(base, facts.expert_bytes, facts.hidden_bytes, facts.top_k)


def planner_for(config: PlacementConfig, facts: ModelFacts) -> Planner:
    """The planner of a model on a server; raises InputError for a bad cost profile."""
    backend = config.backend
    if backend == "auto":
        gathers = facts.all2all_backend in (GATHER_BACKEND, "naive")
        backend = GATHER_BACKEND if gathers else ROUTED_BACKEND
    return Planner(config, cost_constants(facts, config.profile), backend, facts.step_interval)


class Planner:
    """Asks the configured placer, prices its proposal and applies the gain gate.

    Serves every worker of a server and the simulator. Deterministic: ranks that call it with the
    same arguments get the same decision.

    Args:
        config: section `placement`; its backend and profile have gone into the next two.
        constants: of the cost model.
        backend: one of `backends.BACKENDS`.
        horizon_steps: steps between rearrangements.
    """

    def __init__(
        self,
        config: PlacementConfig,
        constants: CostConstants,
        backend: str,
        horizon_steps: int,
    ) -> None:
        self.config = config
        self.horizon_steps = horizon_steps
        self._placer: Placer = PLACERS.build(config.placer, config.options)
        self._constants = constants
        self._template = {
            "constants": constants,
            "alpha": config.alpha,
            "beta": config.beta,
            "gamma": config.gamma,
            "backend": backend,
        }

    def problem(
        self,
        routing: RoutingCounts,
        topology: Topology,
        current: IntArray,
        horizon_steps: int | None = None,
    ) -> PlacementProblem:
        """Raises InputError when counts and map do not fit together."""
        options = self._template | {"horizon_steps": horizon_steps or self.horizon_steps}
        return PlacementProblem(routing, topology, current, **options)  # type: ignore[arg-type]

    def wire_us_per_pair(self, nodes: int) -> float:
        """Of one pair that leaves its engine; 0 where bytes do not depend on placement."""
        if self._template["backend"] != ROUTED_BACKEND:
            return 0.0
        return wire_us_per_pair(self._constants, nodes)

    def decide(
        self,
        routing: RoutingCounts,
        topology: Topology,
        current: IntArray,
        stall_scale: float = 1.0,
        windows: float = 1.0,
        kinds: Sequence[StepKind] = MEAN_STEP,
    ) -> PlacementDecision:
        """Plans from `current`.

        Args:
            stall_scale: what the last migration took over what the model had predicted for it; the
                next prediction is corrected by it.
            windows: over how many intervals the gain may be counted.
            kinds: of step, what is planned for.

        Raises PolicyError, which names the placer, when it fails or answers no placement.
        """
        horizon_steps = round(self.horizon_steps * windows)
        problems = [
            self.problem(
                at_kind(routing, kind), topology, current, max(1, round(horizon_steps * kind.share))
            )
            for kind in kinds
        ]
        plan = self._plan(problems, kinds)
        options = horizon_steps, self.config.gamma, self.config.gate
        modelled_us = gate.decide(plan, *options).stall_us
        verdict = gate.decide(plan, *options, stall_us=modelled_us * stall_scale)
        if not getattr(self._placer, "gated", True):
            verdict = gate.ungated(verdict, plan.moved_slots)
        return PlacementDecision(
            placement=plan.physical_to_logical,
            commit=verdict.commit,
            reason=verdict.reason,
            gain_us_per_step=verdict.gain_us_per_step,
            stall_us=verdict.stall_us,
            modelled_stall_us=modelled_us,
            moved_slots=plan.moved_slots,
            received_experts=plan.received_experts,
            balance_before=plan.balance_before,
            balance_after=plan.balance_planned,
            local_share_before=plan.local_share_before,
            local_share_after=plan.local_share_planned,
        )

    @property
    def expert_bytes(self) -> float:
        """Weights of one expert of one layer."""
        return self._constants.expert_bytes

    def warm_up(self) -> None:
        """Compiles what planning runs, on a toy problem, in a planner of its own.

        Seconds where numba's cache is cold, so the caller runs it in a thread: the server need not
        wait, and the first rearrangement comes hundreds of steps later.
        """
        backend = str(self._template["backend"])
        toy = Planner(self.config, self._constants, backend, self.horizon_steps)
        topology = Topology(2, 2)
        current = np.array([[0, 1, 2, 0]], dtype=np.int32)
        routing = RoutingCounts(np.arange(6, dtype=np.float64).reshape(2, 1, 3), steps=10)
        toy.decide(routing, topology, current)
        near_split(routing.counts, current, topology)

    def forget(self) -> None:
        """Starts anew, as every rank does at the same time: what a placer has learned from past
        windows must be the same everywhere."""
        self._placer = PLACERS.build(self.config.placer, self.config.options)

    def _plan(
        self, problems: list[PlacementProblem], kinds: Sequence[StepKind]
    ) -> heuristic.PlacementPlan:
        plan_kinds = getattr(self._placer, "plan_kinds", None)
        if plan_kinds is not None:
            plan: heuristic.PlacementPlan = plan_kinds(problems, kinds)
            return plan
        first = problems[0]
        placed = self.place(first.routing, first.topology, first.current)
        return mixed(problems, kinds, [placed], keep=False)

    def place(self, routing: RoutingCounts, topology: Topology, current: IntArray) -> IntArray:
        """[layers, slots] what the placer proposes, neither priced nor gated.

        Raises PolicyError, which names the placer, when it fails or answers no placement.
        """
        return answer(self.config.placer, self._placer, routing, topology, current)

    def gain_us_per_step(
        self,
        routing: RoutingCounts,
        topology: Topology,
        before: IntArray,
        after: IntArray,
        kinds: Sequence[StepKind] = MEAN_STEP,
    ) -> float:
        """What `after` saves against `before` on these counts, migration left out."""
        problems = [self.problem(at_kind(routing, kind), topology, before) for kind in kinds]
        plan = mixed(problems, kinds, [after], keep=False)
        old, new = plan.before, plan.after
        return (old.load - new.load) + (old.comm - new.comm)
