"""The simulation: one plain lock-step loop over all DP engines, driven by the core policies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np

from gimbal.core.compiled import compile_kernels
from gimbal.core.config import QueueConfig
from gimbal.core.contracts import (
    DispatchPolicy,
    DispatchRequest,
    FloatArray,
    TimedPolicy,
)
from gimbal.core.cost.profile import Profile
from gimbal.core.cost.step import pack
from gimbal.core.dispatch.dispatcher import Dispatcher
from gimbal.core.errors import InputError
from gimbal.core.feedback.affinity import AffinityPolicy, HomePolicy, home_engines
from gimbal.core.queue.graph_steps import GraphStepCosts
from gimbal.core.snapshot import Field
from gimbal.records.schema import PlacementRecord, RebalanceRecord, RequestRecord
from gimbal.report.arms import Arm
from gimbal.report.window import Window
from gimbal.sim import kernels
from gimbal.sim.cluster import Cluster
from gimbal.sim.engines import engines_of
from gimbal.sim.experts import Experts
from gimbal.sim.policies import policies_of, with_flags
from gimbal.sim.requests import NEVER, SimRequest, StepBatch, check_lengths, requests_of
from gimbal.sim.routing import Population
from gimbal.sim.signals import Signals
from gimbal.sim.step_view import Group
from gimbal.workloads.trace import Trace


@dataclass(slots=True)
class SimResult:
    """Everything one simulated run leaves behind.

    Attributes:
        records: one per request, as a client would have seen it; aborted what had not ended when
            the run did.
        steps: lock-step iterations run.
        duration_s: simulated time from the first arrival to the last token.
        step_us: [steps] their durations.
        step_end_s: [steps] when each ended.
        step_preemptions: [steps] preemptions in each, over all engines.
        step_decodes: [steps] decoding requests over all engines: each got one token per step.
        queued_s: [requests] when the engine took each into its waiting queue, as `records`.
        rebalances: expert rearrangements, proposed and committed.
        placements: what the first and the last of them moved.
        preemptions: over all engines.
        balance: mean over steps of mean/max rank pairs (1 is even).
    """

    records: list[RequestRecord]
    steps: int
    duration_s: float
    step_us: FloatArray
    step_end_s: FloatArray
    step_preemptions: FloatArray
    step_decodes: FloatArray
    queued_s: FloatArray
    rebalances: list[RebalanceRecord] = field(default_factory=list)
    placements: list[PlacementRecord] = field(default_factory=list)
    preemptions: int = 0
    balance: float = 1.0


class Simulation:
    """One run of one arm over one trace; `run` may be called once.

    Args:
        cluster: the arm's flags change it for this run.
        concurrency: closed loop: that many requests at a time, arrival times are ignored.
    """

    def __init__(
        self,
        trace: Trace,
        cluster: Cluster,
        profile: Profile,
        population: Population,
        arm: Arm,
        seed: int = 0,
        concurrency: int | None = None,
    ) -> None:
        cluster = with_flags(cluster, arm)
        self.cluster, self.profile, self.arm = cluster, profile, arm
        self.policies = policies = policies_of(arm, cluster)
        self._prefix_block_tokens = trace.prefix_block_tokens
        domains = {name: i for i, name in enumerate(population.names)}
        kv_tokens = cluster.kv_tokens or profile.kv_tokens
        self._pending = requests_of(trace, profile, domains)
        check_lengths(self._pending, trace.name, cluster.name, kv_tokens, cluster.block_size)
        self._trace = trace
        self._next = 0
        self._released = len(self._pending)
        if concurrency is not None:
            self._released = concurrency
            for request in self._pending:
                request.arrival_us = profile.api_us if request.index < concurrency else np.inf
        self._late: list[SimRequest] = []
        self._awaited, self._missing = range(0), 0  # requests that matter, and of them open ones
        self.group = Group()
        self.engines = engines_of(cluster, policies, kv_tokens, len(domains), self.group)
        self._pooled = cluster.dp // len(self.engines)  # DP ranks that each of them stands for
        for engine in self.engines:
            engine.set_prefix_block_tokens(trace.prefix_block_tokens)
        self.group.graphs = self._graph_costs(self.engines[0].queue)
        weight = 0.0 if policies.feedback is None else policies.feedback.weight
        self.dispatcher = Dispatcher(len(self.engines), policies.dispatch, feedback_weight=weight)
        compile_kernels()
        self._domains = population.names
        homes = self._use_affinity(domains)
        interval_us = cluster.stats_interval_ms * 1e3
        self.signals = Signals(self.engines, policies.fresh_signals, interval_us, self.group.graphs)
        self.dispatcher.fit_prefix_index(self.signals.board)
        expected = self._expected_tokens(homes) if policies.simulated.oracle else None
        self.experts = Experts(cluster, profile, population, policies, seed, expected)
        self._update_affinity()
        self._packed = pack(profile)
        self._shape: FloatArray = np.zeros((len(self.engines), 5))
        # Engines count their tokens by domain in the very rows that a step is priced from.
        self._tokens: FloatArray = np.zeros((len(self.engines), len(domains)))
        self._decodes: FloatArray = np.zeros((len(self.engines), len(domains)))
        for engine, tokens, decodes in zip(self.engines, self._tokens, self._decodes, strict=True):
            engine.domain_tokens, engine.domain_decodes = tokens, decodes
        self._step_us: list[float] = []
        self._step_end_us: list[float] = []
        self._preempted: list[int] = []  # up to each step's end
        self._step_decodes: list[int] = []

    def _graph_costs(self, queue: QueueConfig) -> GraphStepCosts | None:
        """What steps with and without CUDA graphs take, where the arm's queue goes by it."""
        # Under a prefill interval a server cuts nothing either.
        if queue.graph_steps <= 0.0 or self.cluster.prefill_schedule_interval > 1:
            return None
        graph_tokens = self.profile.graph_tokens * self._pooled
        return GraphStepCosts(graph_tokens) if graph_tokens else None

    def _use_affinity(self, domains: dict[str, int]) -> dict[str, int]:
        """Wraps the arm's dispatch policy as its affinity asks; returns domains' home engines."""
        policy: DispatchPolicy = self.dispatcher.policy
        self._affinity: AffinityPolicy | None = None
        affinity = self.policies.simulated.affinity
        if affinity == "local":
            if not getattr(policy, "term_names", ()):
                raise InputError(f"arm {self.arm.name}: its dispatch policy has no terms to price")
            self._affinity = AffinityPolicy(cast(TimedPolicy, policy), domains, self.cluster.dp)
            self.dispatcher.use_policy(self._affinity)
        if affinity != "home":
            return {}
        tokens = dict.fromkeys(domains, 0.0)
        for request in self._pending:
            tokens[self._domains[request.domain]] += request.prompt_tokens + request.output_tokens
        homes = home_engines(tokens, self.cluster.dp)
        self.dispatcher.use_policy(HomePolicy(policy, homes))
        return homes

    def _expected_tokens(self, homes: dict[str, int]) -> FloatArray:
        """[dp, domains] tokens of the run: at home, or even over engines without one."""
        tokens = np.zeros((self.cluster.dp, len(self._domains)))
        for request in self._pending:
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

    def run(self, window: Window | None = None, until_s: float = np.inf) -> SimResult:
        """Simulates until every request is done, or all that matter.

        Args:
            window: only what happens in it, and the requests that arrive in it, matter.
            until_s: stop at that time whatever is open.
        """
        now, until_us = 0.0, until_s * 1e6
        measured_us = 0.0 if window is None else window.end_s * 1e6
        self._awaited = self._arriving(window)
        self._missing, total = len(self._awaited), len(self._pending)
        while now < until_us and (self._missing or (now < measured_us and self._next < total)):
            if not self._late and not any(e.busy for e in self.engines):
                now = max(now, self._pending[self._next].arrival_us)
                self._dispatch_until(now)
                self._deliver(now)
            elif not self.cluster.async_scheduling:
                self._deliver(now)
            now = self._step(now)
        return self._result(now)

    def _arriving(self, window: Window | None) -> range:
        """Indices of the requests that arrive in `window`; without one all."""
        if window is None:
            return range(len(self._pending))
        ends = np.searchsorted(self._trace.arrivals_s, (window.begin_s, window.end_s))
        return range(*ends.tolist())

    def _step(self, start_us: float) -> float:
        """Runs one lock-step step of all engines; returns the time of its end."""
        batches = self._schedule(start_us)
        if self.cluster.async_scheduling:
            # Step k+1 is scheduled as soon as k runs: what came during k waits for k+2.
            self._deliver(start_us)
        changes = len(self.experts.rebalances)
        stall_us = self.experts.before_step(len(self._step_us), start_us)
        if len(self.experts.rebalances) > changes:
            self._update_affinity()
        duration_us = self._duration_us(batches) + stall_us
        end_us = start_us + duration_us
        self._dispatch_until(end_us)
        for engine, batch in zip(self.engines, batches, strict=True):
            for request in engine.finish_step(batch, end_us):
                self.dispatcher.finished(request.request_id)
                self._missing -= request.index in self._awaited
                self._release(end_us)
        self.signals.step_done(batches, duration_us)
        self._step_us.append(duration_us)
        self._step_end_us.append(end_us)
        self._preempted.append(sum([engine.preemptions for engine in self.engines]))
        self._step_decodes.append(sum(batch.decodes for batch in batches))
        return end_us

    def _schedule(self, start_us: float) -> list[StepBatch]:
        """Every engine's batch, by what the group looked like before any of them took its own."""
        interval = self.cluster.prefill_schedule_interval
        due = interval <= 1 or len(self._step_us) % interval == 0
        group, engines = self.group, self.engines
        if engines[0].decides:
            group.backlog_tokens = max([engine.backlog_tokens for engine in engines])
            group.decode_tokens = max([engine.decodes for engine in engines])
        batches = [engine.schedule(start_us / 1e6, due) for engine in engines]
        if group.graphs is not None and any(e.decision.asked_graphs for e in engines):
            group.graphs.decided()
        return batches

    def _release(self, now_us: float) -> None:
        """In a closed loop the end of one request sends the next."""
        if self._released < len(self._pending):
            self._pending[self._released].arrival_us = now_us + self.profile.api_us
            self._released += 1

    def _duration_us(self, batches: Sequence[StepBatch]) -> float:
        shape = self._shape
        for row, batch in zip(shape, batches, strict=True):
            row[:] = (
                # A rank without tokens runs a dummy batch of one.
                max(batch.tokens, self._pooled),
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
        return rows if self._pooled == 1 else np.repeat(rows / self._pooled, self._pooled, axis=0)

    def _dispatch_until(self, end_us: float) -> None:
        """Sends every request that reaches the front end before `end_us` to an engine."""
        while self._next < len(self._pending):
            request = self._pending[self._next]
            if request.arrival_us > end_us:
                return
            self._next += 1
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
                ),
                self._prompt(request),
                board,
                request.arrival_us,
            )
            request.engine = decision.engine
            self.signals.count_dispatch(decision.engine)
            self._late.append(request)

    def _prompt(self, request: SimRequest) -> list[int] | None:
        """Token ids with the trace's shared prefixes, for the dispatcher's prefix index."""
        size = self._prefix_block_tokens
        if not request.prefix_blocks or not size:
            return None
        tokens = [block for block in request.prefix_blocks for _ in range(size)]
        tokens += [-1 - request.index] * (request.prompt_tokens - len(tokens))
        return tokens[: request.prompt_tokens]

    def _deliver(self, now_us: float) -> None:
        for request in self._late:
            engine = self.engines[request.engine]
            request.queued_us = now_us
            engine.add(request, now_us / 1e6)
        self._late.clear()

    def _result(self, now_us: float) -> SimResult:
        self.experts.close_comparison()
        seen = [request for request in self._pending[: self._next] if request.engine >= 0]
        return SimResult(
            [self._record(request) for request in seen],
            len(self._step_us),
            now_us / 1e6,
            np.array(self._step_us),
            np.array(self._step_end_us) / 1e6,
            np.diff(np.array(self._preempted, dtype=float), prepend=0.0),
            np.array(self._step_decodes, dtype=float),
            np.array([request.queued_us / 1e6 for request in seen]),
            self.experts.rebalances,
            self.experts.placements,
            sum(engine.preemptions for engine in self.engines),
            self.experts.mean_balance,
        )

    def _record(self, request: SimRequest) -> RequestRecord:
        api_s = self.profile.api_token_us / 1e6
        source = self._trace.requests[request.index]
        begun, done = request.first_token_us > 0, request.last_token_us > 0
        received = request.generated
        if request.decode_from_step != NEVER and not done:
            received += self.engines[request.engine].step - request.decode_from_step
        sent_s = (request.arrival_us - self.profile.api_us) / 1e6
        return RequestRecord(
            request_id=request.request_id,
            arm=self.arm.name,
            repeat=0,
            arrival_s=sent_s,
            sent_s=sent_s,
            prompt_tokens=request.prompt_tokens,
            output_tokens=request.output_tokens if done else received,
            expected_output_tokens=request.output_tokens,
            first_token_s=request.first_token_us / 1e6 + api_s if begun else None,
            last_token_s=request.last_token_us / 1e6 + api_s if done else None,
            engine=request.engine if self._pooled == 1 else request.index % self._pooled,
            session=request.session,
            domain=source.domain,
            status="ok" if done else "aborted",
            index=request.index,
        )
