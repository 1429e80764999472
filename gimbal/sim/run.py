"""The simulation: groups of engines, each in lock step, driven by the core policies."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import attrgetter

import numpy as np

from gimbal.core.compiled import compile_kernels
from gimbal.core.contracts import FloatArray
from gimbal.core.cost.profile import Profile
from gimbal.records.schema import PlacementRecord, RebalanceRecord, RequestRecord
from gimbal.report.arms import Arm
from gimbal.report.window import Window
from gimbal.sim.cluster import Cluster, profile_of
from gimbal.sim.engine import Engine
from gimbal.sim.group import EngineGroup
from gimbal.sim.policies import with_flags
from gimbal.sim.requests import NEVER, SimRequest, requests_of
from gimbal.sim.roles import DecodeEngine, PrefillEngine
from gimbal.sim.routing import Population
from gimbal.sim.transfer import KvLinks
from gimbal.workloads.trace import Trace


@dataclass(slots=True)
class SimResult:
    """Everything one simulated run leaves behind.

    Steps are those of the engines that answer clients; rearrangements, preemptions and balance are
    of all engines.

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
        prefill_s: [requests] with prefill apart, from sending a request to the prefill engine's
            answer, as `records`; NaN where there is none yet, empty without prefill apart.
        kv_wait_s: [requests] the same from there until its KV is in a decode engine.
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
    prefill_s: FloatArray = field(default_factory=lambda: np.empty(0))
    kv_wait_s: FloatArray = field(default_factory=lambda: np.empty(0))


class Simulation:
    """One run of one arm over one trace; `run` may be called once.

    A cluster with prefill apart is two groups of engines, each stepping by itself. A proxy sends
    every request to a prefill engine first, and its answer's KV to a decode engine, which answers
    the client (vLLM's NixlConnector and its proxy).

    Args:
        cluster: the arm's flags change it for this run.
        concurrency: closed loop: that many requests at a time, arrival times are ignored.

    Attributes:
        answering: the engines that answer clients: all, or those that decode.
        prefill: engines that prefill only; None where there are none.
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
        domains = {name: i for i, name in enumerate(population.names)}
        self._pending = requests_of(trace, profile, domains)
        self._trace = trace
        self._next = 0
        self._released = len(self._pending)
        if concurrency is not None:
            self._released = concurrency
            for request in self._pending:
                request.arrival_us = profile.api_us if request.index < concurrency else np.inf
        self._awaited, self._missing = range(0), 0  # requests that matter, and of them open ones
        compile_kernels()

        def group(cluster: Cluster, profile: Profile, kind: type[Engine]) -> EngineGroup:
            requests = self._pending
            return EngineGroup(cluster, profile, population, arm, trace, requests, seed, kind)

        self._answers = self._pending  # by index, as the engines that answer clients have them
        self._handovers: list[tuple[float, int]] = []  # heap: when a decode server gets it, index
        self._kv_come_us = np.full(len(self._pending), np.nan)
        self.prefill: EngineGroup | None = None
        self.answering = group(
            cluster, profile, Engine if cluster.prefill is None else DecodeEngine
        )
        self.groups = [self.answering]
        if cluster.prefill is not None:
            self._answers = requests_of(trace, profile, domains)
            for request in self._pending:
                request.output_tokens, request.answered_blocks = 1, ()
            apart = with_flags(cluster.prefill, arm)
            self.prefill = group(apart, profile_of(apart), PrefillEngine)
            self.groups.insert(0, self.prefill)
            engines = [len(each.engines) for each in self.groups]
            self._links = KvLinks(cluster, profile, *engines)

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
            now = self._next_end(now)
        return self._result(now)

    def _arriving(self, window: Window | None) -> range:
        """Indices of the requests that arrive in `window`; without one all."""
        if window is None:
            return range(len(self._pending))
        ends = np.searchsorted(self._trace.arrivals_s, (window.begin_s, window.end_s))
        return range(*ends.tolist())

    def _next_end(self, now_us: float) -> float:
        """Goes on to the next end of a group's step; returns its time."""
        for group in self.groups:
            if not group.stepping and group.has_work:
                self._begin_step(group, now_us)
        while (coming_us := self._coming_us()) <= min(group.ends_us for group in self.groups):
            assert coming_us < np.inf, "requests are left that nobody works on"
            self._dispatch(coming_us)
            for group in self.groups:
                if not group.stepping and group.late:  # it was idle
                    group.deliver(coming_us)
                    self._begin_step(group, coming_us)
        group = min(self.groups, key=attrgetter("ends_us"))
        end_us = group.ends_us
        for request in group.end_step():
            self._finished(group, request, end_us)
        return end_us

    def _begin_step(self, group: EngineGroup, now_us: float) -> None:
        group.begin_step(now_us)
        if group is self.answering and self.prefill is not None:
            self._begin_loads(self.prefill, now_us)

    def _begin_loads(self, prefilling: EngineGroup, now_us: float) -> None:
        """Decode engines ask for the KV of the prompts that have got blocks for it."""
        for engine in self.answering.engines:
            for request in engine.loads.begun:
                source = self._pending[request.index]
                end_us = self._links.send(source.engine, engine.index, request.awaited, now_us)
                self._kv_come_us[request.index] = end_us
                prefilling.transfer(source, end_us)
                self.answering.transfer(request, end_us)
            engine.loads.begun.clear()

    def _coming_us(self) -> float:
        """When the next request reaches a front end."""
        waiting = self._next < len(self._pending)
        coming_us = self._pending[self._next].arrival_us if waiting else np.inf
        return min(coming_us, self._handovers[0][0]) if self._handovers else coming_us

    def _dispatch(self, now_us: float) -> None:
        """Sends every request that reaches a front end until `now_us` to an engine."""
        while self._next < len(self._pending):
            request = self._pending[self._next]
            if request.arrival_us > now_us:
                break
            self._next += 1
            self.groups[0].dispatch(request)
        while self._handovers and self._handovers[0][0] <= now_us:
            arrival_us, index = heapq.heappop(self._handovers)
            request = self._answers[index]
            request.arrival_us, request.loads = arrival_us, True
            self.answering.dispatch(request)

    def _finished(self, group: EngineGroup, request: SimRequest, now_us: float) -> None:
        if group is self.prefill:
            # The proxy has the answer, and its next request the way to the other front end.
            arrival_us = now_us + self.profile.api_token_us + self.profile.api_us
            heapq.heappush(self._handovers, (arrival_us, request.index))
            return
        self._missing -= request.index in self._awaited
        if self._released < len(self._pending):  # in a closed loop the end of one sends the next
            self._pending[self._released].arrival_us = now_us + self.profile.api_us
            self._released += 1

    def _result(self, now_us: float) -> SimResult:
        for group in self.groups:
            group.experts.close_comparison()
        seen = [request for request in self._pending[: self._next] if request.engine >= 0]
        steps, experts = self.answering, [group.experts for group in self.groups]
        apart = self.prefill is not None
        return SimResult(
            [self._record(request) for request in seen],
            len(steps.step_us),
            now_us / 1e6,
            np.array(steps.step_us),
            np.array(steps.step_end_us) / 1e6,
            np.diff(np.array(steps.preempted, dtype=float), prepend=0.0),
            np.array(steps.step_decodes, dtype=float),
            np.array([request.queued_us / 1e6 for request in seen]),
            [rebalance for own in experts for rebalance in own.rebalances],
            [placement for own in experts for placement in own.placements],
            sum(engine.preemptions for group in self.groups for engine in group.engines),
            float(np.mean([own.mean_balance for own in experts])),
            self._prefill_s(seen) if apart else np.empty(0),
            self._kv_wait_s(seen) if apart else np.empty(0),
        )

    def _prefill_s(self, seen: Sequence[SimRequest]) -> FloatArray:
        sent_us = np.array([request.arrival_us - self.profile.api_us for request in seen])
        times_s: FloatArray = (self._prefilled_us(seen) + self.profile.api_token_us - sent_us) / 1e6
        return times_s

    def _kv_wait_s(self, seen: Sequence[SimRequest]) -> FloatArray:
        come_us = self._kv_come_us[[request.index for request in seen]]
        waits_s: FloatArray = (come_us - self._prefilled_us(seen)) / 1e6
        return waits_s

    def _prefilled_us(self, seen: Sequence[SimRequest]) -> FloatArray:
        return np.array([request.last_token_us or np.nan for request in seen])

    def _record(self, asked: SimRequest) -> RequestRecord:
        """Args: asked the request as it came first."""
        request = self._answers[asked.index]
        api_s = self.profile.api_token_us / 1e6
        source = self._trace.requests[request.index]
        begun, done = request.first_token_us > 0, request.last_token_us > 0
        received = request.generated
        if request.decode_from_step != NEVER and not done:
            received += self.answering.engines[request.engine].step - request.decode_from_step
        sent_s = (asked.arrival_us - self.profile.api_us) / 1e6
        pooled = self.answering.pooled
        engine = request.engine if pooled == 1 else request.index % pooled
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
            engine=engine if request.engine >= 0 else None,
            session=request.session,
            domain=source.domain,
            status="ok" if done else "aborted",
            index=request.index,
        )
