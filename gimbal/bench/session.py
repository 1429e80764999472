"""One benchmark: arms in turns on live servers, records as they come, the report at the end."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from gimbal.bench.arms import ServerSpec, switches
from gimbal.bench.capacity import measure_capacity
from gimbal.bench.client import Replay
from gimbal.bench.client_process import ReplayJob, run_replay
from gimbal.bench.endpoint import Endpoint, counter_differences
from gimbal.bench.turn_rows import client_cost, hit_rate, run_row, sum_engines
from gimbal.bench.turns import Turn
from gimbal.records.schema import RequestRecord, RunInfo
from gimbal.records.store import RunWriter
from gimbal.report.arms import Arm
from gimbal.report.compare import compare, nested
from gimbal.report.metrics import Slo, balance, summarize
from gimbal.report.window import Window, backlog_of
from gimbal.workloads import Trace, WorkloadOptions, build_workload
from gimbal.workloads.load import DEFAULT_RATE_RPS
from gimbal.workloads.prompts import Vocabulary

WARM_UP_RPS = 4.0
WARM_UP_OUTPUT = 32
CAPACITY_REQUESTS = 4000
PAPER_BASE = "vllm-legacy"
"""What the Gimbal paper compares with; ratios to it are shown beside those to today's vLLM."""


@dataclass(frozen=True)
class BenchOptions:
    """What is measured.

    Attributes:
        trace: where requests come from.
        workload: what is taken from it; its rate is replaced when `load` is set.
        repeats: turns of every arm.
        seed: of workloads and prompts.
        salt: makes prompts differ from those of any earlier benchmark on the same server.
        duration_s: span of the measured arrivals of one turn when the workload does not say how
            many requests.
        settle_s: arrivals before and after those; None is as long as requests stayed at the
            measured capacity. Without either a turn is measured as a whole.
        load: fraction of the measured capacity, or None for the workload's own rate.
        capacity_rps: known capacity; measured when None and `load` is set.
        warm_up: requests before every turn, not counted.
        slo: what goodput counts.
        share: arms that can be switched at run time share a server.
        timeout_s: limit of one request.
        pin_engines: see `ReplayJob`.
    """

    trace: Trace
    workload: WorkloadOptions
    repeats: int = 1
    seed: int = 0
    salt: int = 0
    duration_s: float = 60.0
    settle_s: float | None = None
    load: float | None = None
    capacity_rps: float | None = None
    warm_up: int = 16
    slo: Slo = field(default_factory=Slo)
    share: bool = True
    timeout_s: float = 600.0
    pin_engines: int = 0


class BenchSession:
    """Runs the plan. Records of finished turns are on disk whatever happens later.

    Args:
        options: what is measured.
        arms: in the order asked for.
        server_of: returns the endpoint for a server specification, starting it if need be.
        vocabulary_of: returns what prompts are made of, for an endpoint.
        writer: where records go.
        info: of the run; its `runs` and `result` are filled in as they come.
        switch: arms are switched at run time through the control route.
        on_progress: gets (requests ended, streams open) during a turn.
        say: gets one line per event worth telling.
    """

    def __init__(
        self,
        options: BenchOptions,
        arms: Sequence[Arm],
        server_of: Callable[[ServerSpec], Endpoint],
        vocabulary_of: Callable[[Endpoint], Vocabulary],
        writer: RunWriter,
        info: RunInfo,
        switch: bool = True,
        on_progress: Callable[[int, int], None] | None = None,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.options = options
        self.arms = list(arms)
        self.info = info
        self.records: dict[str, list[list[RequestRecord]]] = {arm.name: [] for arm in arms}
        self.rate_rps: float | None = options.workload.rate_rps
        self.capacity_rps = options.capacity_rps
        self.settle_s = options.settle_s or 0.0
        self._server_of = server_of
        self._vocabulary_of = vocabulary_of
        self.writer = writer
        self.switches = switch
        self._on_progress = on_progress
        self._say = say
        self._runs: list[dict[str, Any]] = []

    def restore(self, rows: Sequence[dict[str, Any]], requests: Sequence[RequestRecord]) -> None:
        """Takes over turns that an earlier, stopped session finished: their rows and records."""
        for row in rows:
            own = [r for r in requests if (r.arm, r.repeat) == (row["arm"], row["repeat"])]
            self.records[row["arm"]].append(own)
            self.writer.write(own)
            self._runs.append(dict(row))
        self._write_info(None)

    def has(self, arm: str, repeat: int) -> bool:
        """Whether that turn has been run."""
        return any((row["arm"], row["repeat"]) == (arm, repeat) for row in self._runs)

    def settle_rate(self, spec: ServerSpec, arm: Arm) -> None:
        """Turns a load into a rate, measuring the capacity of `arm` if it is not known."""
        options, load = self.options, self.options.load
        if load is None:
            return
        if self.capacity_rps is None:
            endpoint = self._prepare(Turn(0, arm, spec))
            workload = self._workload(0, endpoint, CAPACITY_REQUESTS)
            job = self._job(endpoint, workload, "capacity", (0xCA,))
            self._say(f"measuring the capacity of arm {arm.name}")
            found = measure_capacity(
                job,
                lambda j: run_replay(j, self._on_progress),
                turn_requests=lambda rps: self._turn_requests(
                    options.workload.before_scaling(load * rps)
                ),
                say=self._say,
            )
            self.capacity_rps = found.rate_rps
            if options.settle_s is None:
                self.settle_s = found.stay_s
            endpoint.wait_idle(options.timeout_s)
        own_rps = load * self.capacity_rps
        self.rate_rps = options.workload.before_scaling(own_rps)
        self._say(
            f"capacity {self.capacity_rps:.2f} requests/s; load {load:g} is "
            f"{own_rps:.2f} requests/s"
        )

    def run(self, turn: Turn) -> None:
        """One turn: prepare, warm up, replay, record."""
        endpoint = self._prepare(turn)
        workload = self._workload(turn.repeat, endpoint)
        ordinal = [arm.name for arm in self.arms].index(turn.arm.name)
        name = f"{turn.arm.name}-r{turn.repeat}"
        self._warm_up(endpoint, workload, (turn.repeat, ordinal))
        endpoint.wait_idle()
        before = endpoint.counters()
        began = time.time()
        job = self._job(endpoint, workload, name, (turn.repeat, ordinal, 1))
        try:
            replay = run_replay(job, self._on_progress)
        except KeyboardInterrupt as interrupt:
            partial = getattr(interrupt, "replay", None)
            if partial is not None:
                self.writer.write(to_records(turn, workload, partial))
            raise
        endpoint.wait_idle()
        counters = counter_differences(before, endpoint.counters())
        records = to_records(turn, workload, replay)
        self.records[turn.arm.name].append(records)
        self.writer.write(records)
        self._runs.append(run_row(turn, began, workload, replay, counters))
        self._write_info(None)

    def _prepare(self, turn: Turn) -> Endpoint:
        """The turn's server, switched to its arm, with empty prefix caches if it can be."""
        endpoint = self._server_of(turn.spec)
        if self.switches:
            endpoint.switch(switches(turn.arm) | {"reset": True})
        return endpoint

    def _workload(self, repeat: int, endpoint: Endpoint, count: int | None = None) -> Trace:
        """The requests of one repeat: the same in every arm, others in every repeat."""
        options = self.sized_workload()
        if count is not None:
            options = replace(options, requests=min(count, self.options.trace.most_requests))
        context = endpoint.model().max_model_len
        if context is not None:
            options = replace(options, max_total=min(context, options.max_total or context))
        domains = self._vocabulary_of(endpoint).names
        return build_workload(self.options.trace, options, self.options.seed + repeat, domains)

    def sized_workload(self) -> WorkloadOptions:
        """The workload's options with the settled rate and a number of requests."""
        count = self._turn_requests(self._rate_rps)
        return replace(self.options.workload, rate_rps=self.rate_rps, requests=count)

    def _turn_requests(self, rate_rps: float) -> int:
        """Requests of one turn: as many as asked for, or as arrive in its duration, and those that
        arrive before and after."""
        options, trace = self.options.workload, self.options.trace
        around = math.ceil(2 * self.settle_s * rate_rps / options.scale_time)
        if options.requests is not None:
            return options.requests + around
        count = max(2, round(rate_rps * self.options.duration_s / options.scale_time))
        return count + around if around else min(count, trace.most_requests)

    @property
    def window(self) -> Window | None:
        """The measured part of a turn; None: all of it."""
        if not self.settle_s:
            return None
        options, span_s = self.options.workload, self.options.duration_s
        if options.requests is not None:
            span_s = options.requests / self._rate_rps * options.scale_time
        return Window(self.settle_s, self.settle_s + span_s)

    @property
    def _rate_rps(self) -> float:
        return self.rate_rps or self.options.trace.rate_rps or DEFAULT_RATE_RPS

    def _job(
        self, endpoint: Endpoint, trace: Trace, prefix: str, salt: tuple[int, ...]
    ) -> ReplayJob:
        return ReplayJob(
            endpoint.url,
            endpoint.model().name,
            trace,
            self._vocabulary_of(endpoint),
            (self.options.salt, self.options.seed, *salt),
            prefix,
            self.options.timeout_s,
            self.options.timeout_s,
            self.options.pin_engines,
        )

    def _warm_up(self, endpoint: Endpoint, workload: Trace, salt: tuple[int, ...]) -> None:
        count = min(self.options.warm_up, len(workload))
        if not count:
            return
        rows = tuple(
            replace(
                r, arrival_s=i / WARM_UP_RPS, output_tokens=min(r.output_tokens, WARM_UP_OUTPUT)
            )
            for i, r in enumerate(workload.requests[:count])
        )
        job = self._job(endpoint, replace(workload, requests=rows), "warm", (*salt, 0))
        run_replay(job)

    def report(self) -> dict[str, Any]:
        """The object that ``--json`` prints, over the turns finished so far; also recorded."""
        done = {name: runs for name, runs in self.records.items() if runs}
        slo, window = self.options.slo, self.window
        arms: dict[str, Any] = {}
        for name, runs in done.items():
            rows = [row for row in self._runs if row["arm"] == name]
            arms[name] = summarize(runs, slo, window) | {
                "backlog": backlog_of(runs, window).to_json() if window else None,
                "repeats": len(runs),
                "balance": balance(sum_engines(rows, "tokens_by_engine")),
                "requests_by_engine": balance(sum_engines(rows, "requests_by_engine")),
                "prefix_hit_rate": hit_rate(rows),
                "client_core_share": float(np.mean([row["client"]["core_share"] for row in rows])),
            }
        result = {
            "arms": arms,
            "ratios": self._ratios(done, slo),
            "window": window.to_json() if window else None,
            "seed": self.options.seed,
            "load": self.options.load,
            "capacity_rps": self.capacity_rps,
            "rate_rps": self.rate_rps,
            "slo": slo.limits(),
            "client": client_cost(self._runs),
            "environment": self.info.environment,
        }
        self._write_info(result)
        return result

    def _ratios(self, done: dict[str, list[list[RequestRecord]]], slo: Slo) -> dict[str, Any]:
        base = self.base
        if base not in done or len(done) < 2:
            return {}
        pair = {name: done[name] for name in (PAPER_BASE, "gimbal") if name in done}
        ratios: dict[str, Any] = {}
        for against, runs in ((base, done), (PAPER_BASE, pair)):
            if against in runs and len(runs) > 1:
                intervals = compare(runs, against, slo, self.window)
                ratios |= {f"{name}/{against}": nested(own) for name, own in intervals.items()}
        return ratios

    @property
    def base(self) -> str:
        """The arm that ratios divide by: ``vllm`` where it takes part, else the first."""
        names = [arm.name for arm in self.arms]
        return "vllm" if "vllm" in names else names[0]

    def _write_info(self, result: dict[str, Any] | None) -> None:
        self.info = replace(self.info, runs=tuple(self._runs), result=result)
        self.writer.write_info(self.info)


def to_records(turn: Turn, workload: Trace, replay: Replay) -> list[RequestRecord]:
    """What the client saw, as records."""
    records = []
    for index, result in enumerate(replay.results):
        request = workload.requests[index]
        times = result.token_times_s
        records.append(
            RequestRecord(
                request_id=result.request_id,
                arm=turn.arm.name,
                repeat=turn.repeat,
                arrival_s=round(request.arrival_s, 6),
                sent_s=round(result.sent_s, 6),
                prompt_tokens=request.prompt_tokens,
                output_tokens=result.output_tokens,
                expected_output_tokens=request.output_tokens,
                first_token_s=round(times[0], 6) if times else None,
                last_token_s=round(times[-1], 6) if times else None,
                token_times_s=tuple(round(t, 6) for t in times),
                engine=result.engine,
                session=request.session,
                domain=request.domain,
                status=result.status,
                error=result.error,
                index=index,
            )
        )
    return records
