"""A group of simulated engines that step together, with what decides about their requests."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import cast

import numpy as np

from gimbal.core.config import QueueConfig
from gimbal.core.contracts import DispatchPolicy, DispatchRequest, FloatArray, TimedPolicy
from gimbal.core.cost.profile import Profile
from gimbal.core.cost.step import pack
from gimbal.core.dispatch.dispatcher import Dispatcher
from gimbal.core.errors import InputError
from gimbal.core.feedback.affinity import AffinityPolicy, HomePolicy, home_engines
from gimbal.core.queue.graph_steps import GraphStepCosts
from gimbal.core.snapshot import Field
from gimbal.report.arms import Arm
from gimbal.sim import kernels
from gimbal.sim.cluster import Cluster
from gimbal.sim.engine import Engine
from gimbal.sim.engines import engines_of
from gimbal.sim.experts import Experts
from gimbal.sim.policies import policies_of
from gimbal.sim.requests import SimRequest, StepBatch, check_lengths
from gimbal.sim.routing import Population
from gimbal.sim.signals import Signals
from gimbal.sim.step_view import Group
from gimbal.workloads.trace import Trace


class EngineGroup:
    """Engines in lock step behind one dispatcher, and their experts.

    Args:
        cluster: with the arm's flags in force.
        requests: all that the group may get, in order of arrival.
        kind: of engines.

    Attributes:
        ends_us: when the step that runs ends; infinite while none does.
        late: dispatched requests that have not reached their engine's queue.
        step_us: [steps] their durations.
        step_end_us: [steps] when each ended.
        preempted: [steps] preemptions up to each step's end.
        step_decodes: [steps] decoding requests over all engines.
    """

    def __init__(
        self,
        cluster: Cluster,
        profile: Profile,
        population: Population,
        arm: Arm,
        trace: Trace,
        requests: Sequence[SimRequest],
        seed: int,
        kind: type[Engine] = Engine,
    ) -> None:
        self.cluster, self.profile = cluster, profile
        self.policies = policies = policies_of(arm, cluster, kind.role)
        self._prefix_block_tokens = trace.prefix_block_tokens
        self._domains = population.names
        kv_tokens = cluster.kv_tokens or profile.kv_tokens
        check_lengths(requests, trace.name, cluster.name, kv_tokens, cluster.block_size)
        self._view = Group()
        domains = len(population.names)
        self.engines = engines_of(cluster, policies, kv_tokens, domains, self._view, kind)
        self.pooled = cluster.dp // len(self.engines)  # DP ranks that each of them stands for
        for engine in self.engines:
            engine.set_prefix_block_tokens(trace.prefix_block_tokens)
        self._view.graphs = self._graph_costs(self.engines[0].queue)
        weight = 0.0 if policies.feedback is None else policies.feedback.weight
        self.dispatcher = Dispatcher(len(self.engines), policies.dispatch, feedback_weight=weight)
        homes = self._use_affinity(arm, requests)
        interval_us = cluster.stats_interval_ms * 1e3
        self.signals = Signals(self.engines, policies.fresh_signals, interval_us, self._view)
        self.dispatcher.fit_prefix_index(self.signals.board)
        expected = self._expected_tokens(requests, homes) if policies.simulated.oracle else None
        self.experts = Experts(cluster, profile, population, policies, seed, expected)
        self._update_affinity()
        self._packed = pack(profile)
        self._shape: FloatArray = np.zeros((len(self.engines), 5))
        # Engines count their tokens by domain in the very rows that a step is priced from.
        self._tokens: FloatArray = np.zeros((len(self.engines), domains))
        self._decodes: FloatArray = np.zeros((len(self.engines), domains))
        for engine, tokens, decodes in zip(self.engines, self._tokens, self._decodes, strict=True):
            engine.domain_tokens, engine.domain_decodes = tokens, decodes
        self.ends_us = np.inf
        self.late: list[SimRequest] = []
        self._transfers: list[tuple[float, int, SimRequest]] = []  # heap by end
        self._batches: list[StepBatch] = []
        self._duration_us = 0.0  # of the latest step
        self.step_us: list[float] = []
        self.step_end_us: list[float] = []
        self.preempted: list[int] = []
        self.step_decodes: list[int] = []

    def _graph_costs(self, queue: QueueConfig) -> GraphStepCosts | None:
        """What steps with and without CUDA graphs take, where the arm's queue goes by it."""
        # Under a prefill interval a server cuts nothing either.
        if queue.graph_steps <= 0.0 or self.cluster.prefill_schedule_interval > 1:
            return None
        graph_tokens = self.profile.graph_tokens * self.pooled
        return GraphStepCosts(graph_tokens) if graph_tokens else None

    def _use_affinity(self, arm: Arm, requests: Sequence[SimRequest]) -> dict[str, int]:
        """Wraps the arm's dispatch policy as its affinity asks; returns domains' home engines."""
        policy: DispatchPolicy = self.dispatcher.policy
        self._affinity: AffinityPolicy | None = None
        affinity, dp = self.policies.simulated.affinity, self.cluster.dp
        if affinity == "local":
            if not getattr(policy, "term_names", ()):
                raise InputError(f"arm {arm.name}: its dispatch policy has no terms to price")
            places = {name: i for i, name in enumerate(self._domains)}
            self._affinity = AffinityPolicy(cast(TimedPolicy, policy), places, dp)
            self.dispatcher.use_policy(self._affinity)
        if affinity != "home":
            return {}
        tokens = dict.fromkeys(self._domains, 0.0)
        for request in requests:
            tokens[self._domains[request.domain]] += request.prompt_tokens + request.output_tokens
        homes = home_engines(tokens, dp)
        self.dispatcher.use_policy(HomePolicy(policy, homes))
        return homes

    def _expected_tokens(self, requests: Sequence[SimRequest], homes: dict[str, int]) -> FloatArray:
        """[dp, domains] tokens of the run: at home, or even over engines without one."""
        tokens = np.zeros((self.cluster.dp, len(self._domains)))
        for request in requests:
            home = homes.get(self._domains[request.domain])
            own = request.prompt_tokens + request.output_tokens
            if home is None:
                tokens[:, request.domain] += own / self.cluster.dp
            else:
                tokens[home, request.domain] += own
        return tokens

    def _update_affinity(self) -> None:
        if self._affinity is not None:
            self._affinity.us_per_token = self.experts.affinity_us_per_token()

    # -- requests ----------------------------------------------------------------------------

    def dispatch(self, request: SimRequest) -> None:
        """Sends a request that reaches the front end, at its arrival, to an engine."""
        if not self.stepping:  # else engines hear of it when their next step is scheduled
            self._end_transfers(request.arrival_us)
        board = self.signals.read(request.arrival_us)
        if self.experts.loop is not None:
            board[:, Field.EXPERT_PRESSURE_US] = self.experts.loop.pressure_us
        decision = self.dispatcher.dispatch(
            DispatchRequest(
                request.request_id,
                request.prompt_tokens,
                request.arrival_us,
                request.session,
                domain=self._domains[request.domain],
                loaded_tokens=request.prompt_tokens if request.loads else 0,
            ),
            self._prompt(request),
            board,
            request.arrival_us,
        )
        request.engine = decision.engine
        self.signals.count_dispatch(decision.engine)
        self.late.append(request)

    def _prompt(self, request: SimRequest) -> list[int] | None:
        """Token ids with the trace's shared prefixes, for the dispatcher's prefix index."""
        size = self._prefix_block_tokens
        if not request.prefix_blocks or not size:
            return None
        tokens = [block for block in request.prefix_blocks for _ in range(size)]
        tokens += [-1 - request.index] * (request.prompt_tokens - len(tokens))
        return tokens[: request.prompt_tokens]

    def deliver(self, now_us: float) -> None:
        """Engines hear of requests that were sent to them, and of transfers that have ended."""
        for request in self.late:
            engine = self.engines[request.engine]
            request.queued_us = now_us
            engine.add(request, now_us / 1e6)
        self.late.clear()
        self._end_transfers(now_us)

    def transfer(self, request: SimRequest, end_us: float) -> None:
        """The KV of a prompt leaves an engine of this group, or comes to one, until `end_us`."""
        heapq.heappush(self._transfers, (end_us, request.index, request))

    def _end_transfers(self, now_us: float) -> None:
        while self._transfers and self._transfers[0][0] <= now_us:
            _, _, request = heapq.heappop(self._transfers)
            self.engines[request.engine].transferred(request)
            self.signals.changed()

    # -- steps -------------------------------------------------------------------------------

    @property
    def stepping(self) -> bool:
        """Whether a step runs."""
        return self.ends_us < np.inf

    @property
    def has_work(self) -> bool:
        """Whether another step is due."""
        return bool(self.late) or any(e.busy for e in self.engines)

    def begin_step(self, start_us: float) -> None:
        """Begins one lock-step step of all engines."""
        if not self.cluster.async_scheduling:
            self.deliver(start_us)
        self._batches = self._schedule(start_us)
        if self.cluster.async_scheduling:
            # Step k+1 is scheduled as soon as k runs: what came during k waits for k+2.
            self.deliver(start_us)
        changes = len(self.experts.rebalances)
        stall_us = self.experts.before_step(len(self.step_us), start_us)
        if len(self.experts.rebalances) > changes:
            self._update_affinity()
        self._duration_us = self._price(self._batches) + stall_us
        self.ends_us = start_us + self._duration_us

    def end_step(self) -> list[SimRequest]:
        """Ends the step; returns the requests that are finished here."""
        end_us, finished = self.ends_us, []
        for engine, batch in zip(self.engines, self._batches, strict=True):
            for request in engine.finish_step(batch, end_us):
                self.dispatcher.finished(request.request_id)
                finished.append(request)
        self.signals.step_done(self._batches, self._duration_us)
        self.step_us.append(self._duration_us)
        self.step_end_us.append(end_us)
        self.preempted.append(sum([engine.preemptions for engine in self.engines]))
        self.step_decodes.append(sum(batch.decodes for batch in self._batches))
        self.ends_us = np.inf
        return finished

    def _schedule(self, start_us: float) -> list[StepBatch]:
        """Every engine's batch, by what the group looked like before any of them took its own."""
        interval = self.cluster.prefill_schedule_interval
        due = interval <= 1 or len(self.step_us) % interval == 0
        view, engines = self._view, self.engines
        if engines[0].decides:
            view.backlog_tokens = max([engine.backlog_tokens for engine in engines])
            view.decode_tokens = max([engine.decodes for engine in engines])
            view.base_us = self.signals.base_us([engine.decodes for engine in engines])
        batches = [engine.schedule(start_us / 1e6, due) for engine in engines]
        if view.graphs is not None and any(e.decision.asked_graphs for e in engines):
            view.graphs.decided()
        return batches

    def _price(self, batches: Sequence[StepBatch]) -> float:
        """Microseconds that a step of `batches` takes on the device."""
        shape = self._shape
        for row, batch in zip(shape, batches, strict=True):
            row[:] = (
                # A rank without tokens runs a dummy batch of one.
                max(batch.tokens, self.pooled),
                batch.kv_tokens,
                batch.prefill_pairs,
                batch.prefill_kv_tokens,
                batch.sampled,
            )
        shape, tokens = self._by_rank(shape), self._by_rank(self._tokens)
        experts_us = self.experts.step_us(tokens, self._by_rank(self._decodes))
        duration_us = kernels.device_us(shape, experts_us, self._packed)
        before_us = self.experts.step_before_us(tokens)
        if before_us is not None:
            self.experts.note_saved(kernels.device_us(shape, before_us, self._packed) - duration_us)
        return duration_us

    def _by_rank(self, rows: FloatArray) -> FloatArray:
        """[dp, ...] of [engines, ...]: a pool's work is spread evenly over its ranks."""
        return rows if self.pooled == 1 else np.repeat(rows / self.pooled, self.pooled, axis=0)
