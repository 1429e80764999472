"""Experts of the simulated cluster: their time per step, pressure, and rearrangement."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from gimbal.core.config import PlacementConfig
from gimbal.core.contracts import FloatArray, IntArray, RoutingCounts, Topology
from gimbal.core.cost.profile import Profile
from gimbal.core.cost.step import migration_us
from gimbal.core.placement.backends import GATHER_BACKEND
from gimbal.core.placement.kinds import MEAN_STEP, StepKind, step_kinds, typical_share
from gimbal.core.placement.planner import PlacementDecision, Planner
from gimbal.core.placement.problem import constants_of
from gimbal.records.placements import placement_record
from gimbal.records.schema import PlacementRecord, RebalanceRecord
from gimbal.sim import kernels
from gimbal.sim.cluster import Cluster
from gimbal.sim.loop import Loop
from gimbal.sim.policies import SimPolicies
from gimbal.sim.routing import (
    GRID,
    NOISE_POOL,
    Population,
    RoutingTables,
    linear_placement,
    noise_pool,
)

COMPARED_STEPS = 8
"""Every so many steps after a rearrangement are also priced with the placement before it."""


def off_source_us(cluster: Cluster, profile: Profile) -> float:
    """Time of one pair that leaves its engine, there and back in 16 bits; 0 under all-gather.

    Pairs go to other nodes in proportion to the ranks there, over a network card per rank.
    """
    if profile.backend == GATHER_BACKEND:
        return 0.0
    wires = profile.interconnect
    far = max(0, cluster.ranks - cluster.ranks_per_node) / max(1, cluster.ranks - cluster.tp)
    per_byte_us = far / wires.other_node_bytes_per_us + (1 - far) / wires.same_node_bytes_per_us
    return 2 * 2 * profile.model.hidden * per_byte_us / cluster.tp


class Experts:
    """Placement, its per-step cost and its rearrangement every `eplb_step_interval` steps."""

    def __init__(
        self,
        cluster: Cluster,
        profile: Profile,
        population: Population,
        policies: SimPolicies,
        seed: int,
        expected_tokens: FloatArray | None = None,
    ) -> None:
        """Args: expected_tokens [dp, domains] of the whole run, for placers that are oracles."""
        model = profile.model
        self.cluster, self.profile, self.population = cluster, profile, population
        slots = cluster.slots_per_rank or model.experts // cluster.ranks
        self.topology = Topology(cluster.ranks, slots, cluster.tp, cluster.ranks_per_node)
        self.placement = linear_placement(model.layers, model.experts, self.topology)
        self.rebalances: list[RebalanceRecord] = []
        self.placements: list[PlacementRecord] = []  # of the first and the last rearrangement
        self._policies, self._changed = policies, 0
        oracle = policies.simulated.oracle
        self._rebalances = policies.placement.placer != "static" and not oracle
        self._planner = _planner(cluster, profile, policies.placement)
        if oracle and expected_tokens is not None:
            routing = RoutingCounts(np.einsum("sd,dlx->slx", expected_tokens, population.share))
            planned = self._planner.place(routing, self.topology, self.placement)
            pairs = routing.counts.sum(axis=0)
            self.placements.append(
                placement_record(0.0, True, pairs, self.placement, planned, slots)
            )
            self.placement = planned
        self._window = np.zeros((cluster.dp, len(population.names)))
        self._steps_in_window = 0
        self._squares = 0.0  # sum over the window's steps of squared tokens
        self._decodes: FloatArray = np.zeros(self._window.shape)
        self._balance_sum = 0.0
        self._balance_steps = 0
        m = profile.moe
        self._constants = np.array(
            [m.base_us, m.per_active_expert_us, m.per_pair_us, m.per_group_token_us, m.norm]
        )
        self._noise = noise_pool(model.layers, cluster.ranks, seed)
        self._rng = np.random.default_rng([seed, 1])
        self._grid_log = np.log(GRID)
        self._owner = (np.arange(cluster.ranks) // cluster.tp).astype(float)
        self._off_source_us = off_source_us(cluster, profile)
        self._tables = RoutingTables(
            population, self.placement, self.topology, np.ones(len(population.names))
        )
        self._turn = 0
        self._tables_before: RoutingTables | None = None
        self._saved_us = 0.0
        self._compared = 0
        self.loop: Loop | None = None
        if policies.feedback is not None:
            pressure, domains = policies.simulated.pressure, len(population.names)
            self.loop = Loop(cluster, profile, pressure, domains, self._off_source_us)

    def affinity_us_per_token(self) -> FloatArray:
        """[domains, dp] time that the pairs of one token of the domain take to leave the engine."""
        per_layer = self._tables.leaving(self.topology.ranks_per_source)
        return np.asarray(self._off_source_us * per_layer.sum(axis=2).T)

    @property
    def mean_balance(self) -> float:
        """Mean over steps and layers of mean/max rank pairs."""
        return self._balance_sum / self._balance_steps if self._balance_steps else 1.0

    def step_us(self, tokens: FloatArray, decodes: FloatArray) -> float:
        """Fused-expert (and routed-communication) time of a step.

        Args:
            tokens: [dp, domains] of the step.
            decodes: [dp, domains] of `tokens`, those of decodes.
        """
        self._window += tokens
        self._steps_in_window += 1
        self._decodes += decodes
        self._turn = (self._turn + 1) % NOISE_POOL
        time, balance, group_tokens = self._price(tokens, self._tables)
        self._squares += group_tokens * group_tokens
        self._balance_sum += balance / self.profile.model.layers
        self._balance_steps += 1
        if self.loop is not None:
            self.loop.observe(tokens, decodes, self._tables)
        return time

    def step_before_us(self, tokens: FloatArray) -> float | None:
        """What the step just priced would take under the placement before the last change.

        None when nothing has changed, and on all but every `COMPARED_STEPS`-th step.
        """
        if self._tables_before is None or self._steps_in_window % COMPARED_STEPS:
            return None
        return self._price(tokens, self._tables_before)[0]

    def note_saved(self, saved_us: float) -> None:
        """One compared step was shorter by so much thanks to the last change."""
        self._saved_us += saved_us
        self._compared += 1

    def _price(self, tokens: FloatArray, tables: RoutingTables) -> tuple[float, float, float]:
        """Time, sum of balance over layers, tokens of all engines."""
        time, balance, group_tokens = kernels.experts_us(
            tokens,
            tables.pairs,
            tables.active,
            self._grid_log,
            self._noise[self._turn],
            self.population.burstiness,
            self._constants,
            self._off_source_us,
            self._owner,
        )
        return time, balance, group_tokens

    def before_step(self, step: int, now_us: float) -> float:
        """Rearranges when it is due; returns the stall in microseconds (0 when asynchronous)."""
        if not self._rebalances:
            return 0.0
        interval = self.cluster.eplb_step_interval
        # vLLM starts its counter at three quarters of the interval.
        if (step + interval * 3 // 4) % interval or self._steps_in_window == 0:
            return 0.0
        self.close_comparison()
        counts, windows = self._recorded_counts(), 1.0
        if self.loop is not None and self._policies.places:
            local = self._policies.simulated.affinity == "local"
            affinity = self.affinity_us_per_token() if local else None
            counts, windows = self.loop.plan_for(counts, self._window, affinity)
        kinds = self._kinds()
        decision = self._planner.decide(
            counts, self.topology, self.placement, windows=windows, kinds=kinds
        )
        stall = self._record(step, now_us, decision)
        self._window[:] = self._decodes[:] = 0
        self._steps_in_window, self._squares = 0, 0.0
        return 0.0 if self.cluster.eplb_async else stall

    def close_comparison(self) -> None:
        """Writes what the last change has saved per step into its record."""
        if self._compared:
            gain_us, record = self._saved_us / self._compared, self.rebalances[self._changed]
            self.rebalances[self._changed] = replace(record, realized_gain_us_per_step=gain_us)
            if self.loop is not None:
                self.loop.realized(record.predicted_gain_us_per_step, gain_us)
        self._tables_before, self._saved_us, self._compared = None, 0.0, 0

    def _recorded_counts(self) -> RoutingCounts:
        expected = np.einsum("sd,dlx->slx", self._window, self.population.share)
        drawn = self._rng.poisson(expected).astype(float)
        return RoutingCounts(drawn, steps=self._steps_in_window)

    def _kinds(self) -> tuple[StepKind, ...]:
        """Of the window's steps."""
        tokens = float(self._window.sum())
        if tokens <= 0.0:
            return MEAN_STEP
        typical = typical_share(tokens, self._squares, self._steps_in_window)
        return step_kinds(typical, float(self._decodes.sum()) / tokens)

    def _record(self, step: int, now_us: float, decision: PlacementDecision) -> float:
        """Puts a plan in force that may be; returns the stall of a synchronous rearrangement."""
        planned = decision.placement if decision.commit else self.placement
        moved = planned != self.placement
        received = self._received(planned)
        mix = self._window.sum(axis=0)
        before = self._tables
        pairs = np.einsum("d,dlx->lx", mix, self.population.share)
        per_rank = self.topology.slots_per_rank
        snapshot = placement_record(
            now_us / 1e6, bool(moved.any()), pairs, self.placement, planned, per_rank
        )
        self.placements = [*self.placements[:1], snapshot]
        if moved.any():
            self._tables = RoutingTables(self.population, planned, self.topology, mix)
            self._tables_before, self._changed = before, len(self.rebalances)
        self.placement = planned
        layers = int(moved.any(axis=1).sum())
        stall = migration_us(self.profile, received, layers)
        self.rebalances.append(
            RebalanceRecord(
                time_s=now_us / 1e6,
                committed=bool(moved.any()),
                reason=f"step {step}: {decision.reason}",
                predicted_gain_us_per_step=decision.gain_us_per_step,
                predicted_stall_us=decision.stall_us,
                realized_gain_us_per_step=None,
                stall_us=0.0 if self.cluster.eplb_async else stall,
                moved_slots=int(moved.sum()),
                received_experts=int(received),
                balance_before=before.balance,
                balance_after=self._tables.balance,
                local_share_before=before.local_share(self._window, self.topology),
                local_share_after=self._tables.local_share(self._window, self.topology),
            )
        )
        return stall

    def _received(self, planned: IntArray) -> float:
        """Experts that the busiest rank must receive from others, over all layers."""
        per_rank = self.topology.slots_per_rank
        busiest = 0
        for rank in range(self.topology.ranks):
            part = slice(rank * per_rank, (rank + 1) * per_rank)
            missing = sum(
                len(set(new.tolist()) - set(old.tolist()))
                for new, old in zip(planned[:, part], self.placement[:, part], strict=True)
            )
            busiest = max(busiest, missing)
        return float(busiest)


def _planner(cluster: Cluster, profile: Profile, placement: PlacementConfig) -> Planner:
    constants = constants_of(profile)
    if cluster.eplb_async:  # moved beside the steps: only the bytes cost
        constants = replace(constants, migration_fixed_us=0.0)
    backend = profile.backend if placement.backend == "auto" else placement.backend
    return Planner(placement, constants, backend, cluster.eplb_step_interval)
