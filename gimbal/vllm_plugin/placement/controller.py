"""What Gimbal does in one worker at a step, a rearrangement and a commit.

Everything here may fail: `member` and `hook` call it behind the guard. It talks to no other rank;
`member` does. With asynchronous EPLB `propose` and `decided` run in vLLM's worker thread,
everything else in the main thread; vLLM does not start the next gather before the thread is done
with the last.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gimbal.core.config import PlacementConfig
from gimbal.core.contracts import IntArray, RoutingCounts
from gimbal.core.feedback.outlook import window_overlap
from gimbal.core.feedback.pressure import expert_pressure_us
from gimbal.core.guard import LevelGuard
from gimbal.core.placement import verify
from gimbal.core.placement.planner import PlacementDecision
from gimbal.core.placement.replica_split import near_split
from gimbal.records.schema import RebalanceRecord
from gimbal.vllm_plugin.placement.agreement import Verdict, Vote, map_hash
from gimbal.vllm_plugin.placement.rebalance_log import RebalanceLog
from gimbal.vllm_plugin.placement.replicas import write_tables
from gimbal.vllm_plugin.placement.rows import (
    SourceCounts,
    Sources,
    per_source,
    row_length,
    split_rows,
    who_counts,
)
from gimbal.vllm_plugin.placement.sending import measure
from gimbal.vllm_plugin.placement.view import ModelView, Place
from gimbal.vllm_plugin.placement.watch import WorkerWatch
from gimbal.vllm_plugin.placement.window import WindowNotes, carry_over, reduce_window

logger = logging.getLogger("vllm.gimbal")


class Proposal(NamedTuple):
    """What one rank votes on.

    Attributes:
        vote: see `agreement`.
        placement: [layers, slots] the tensor that vLLM takes if all ranks vote to commit.
        decision: what it was decided on; None where there is no plan.
        current: [layers, slots] the map in force.
    """

    vote: Vote
    placement: Any = None
    decision: PlacementDecision | None = None
    current: IntArray | None = None


class StepNote(NamedTuple):
    """A step that runs: its slot of the load window or None, whether experts move, its start."""

    slot: int | None
    moving: bool
    start_s: float


@dataclass(slots=True)
class Controller:
    """One worker's placement level.

    Args:
        config: section ``placement``.
        place: this worker's rank.
        guard: counts fallbacks.
        window_size: slots of vLLM's load window.
        clock_s: monotonic seconds.
    """

    config: PlacementConfig
    place: Place
    guard: LevelGuard
    window_size: int
    clock_s: Callable[[], float] = time.monotonic
    feedback: bool = False  # measures pressure, and plans for the rows that will last
    models: list[ModelView] = field(default_factory=list)
    step: int = 0
    batch: tuple[int, int] = (0, 0)  # (prefill, decode) tokens of the step being run
    stall_us: float = 0.0
    pressure_us: float = 0.0  # of this engine, for dispatch
    straggling_us: np.ndarray = field(default_factory=lambda: np.zeros(1))  # of every engine
    changed_step: int = -1  # engine step of the last commit that moved an expert
    pressure_news: bool = False  # not yet sent to the scheduler
    notes: WindowNotes = field(init=False)
    rebalance_log: RebalanceLog = field(init=False)
    _said: set[str] = field(default_factory=set)
    _start_s: float = field(init=False)
    _async_us: float = 0.0
    _modelled_us: float = 0.0  # the model's stall of the last commit, the same on every rank
    _layers: int = 0  # committed so far: progress of an asynchronous rearrangement
    _worker: WorkerWatch = field(default_factory=WorkerWatch)

    def __post_init__(self) -> None:
        self.notes = WindowNotes(self.window_size, max(self.config.half_life_steps, 1e-3))
        writes = self.config.records and self.place.rank == 0
        self.rebalance_log = RebalanceLog(Path(self.config.records) if writes else None)
        self._start_s = self.clock_s()

    # A step.

    def step_begins(self, state: Any, is_dummy: bool, log_stats: bool) -> StepNote:
        """vLLM is about to close a step of its ``EplbState``."""
        slot = None
        if not is_dummy and state._should_record_current_step(log_stats=log_stats):
            slot = state.expert_load_window_step
            self.recorded(slot)
        moving = state.is_async and any(m.rebalanced for m in state.model_states.values())
        return StepNote(slot, moving, time.perf_counter())

    def step_ended(self, state: Any, note: StepNote | None) -> None:
        """vLLM has; `note` is None where `step_begins` failed."""
        if note is not None:
            if note.moving:
                self.stalled_more((time.perf_counter() - note.start_s) * 1e6)
            self.measure(note.slot)
        self.watch(state)

    def recorded(self, slot: int) -> None:
        """vLLM has written this step's counts to window slot `slot`."""
        self.notes.written(slot, self.step, *self.batch)

    def measure(self, slot: int | None) -> None:
        """A step has run, recorded in window slot `slot` or not at all."""
        measured_us = measure(self.models, slot, self.guard)
        if measured_us is not None:
            self.pressure_us, self.pressure_news = measured_us, True

    def _stop_pressing(self) -> None:
        """Whose slots are whose is no longer known: dispatch is told that nothing presses."""
        for view in self.models:
            view.meter = None
        self.pressure_news |= self.pressure_us > 0.0
        self.pressure_us = 0.0

    def watch(self, state: Any) -> None:
        """Looks after the asynchronous worker, and closes its rearrangement's account."""
        if not state.is_async:
            return
        busy = any(view.state.rebalanced for view in self.models)
        if not busy and self._async_us:
            self.stalled(self._async_us)
            self._async_us = 0.0
        for trouble in self._worker.look(state.async_worker, busy, self._layers, self.clock_s()):
            logger.error(
                "Gimbal: the asynchronous EPLB worker of rank %d is %s: serving goes on, experts "
                "no longer move",
                self.place.rank,
                trouble,
            )
            self.guard.fell_back(f"asynchronous worker {trouble}")

    # A rearrangement.

    def row(self, index: int, raw: Any) -> Any:
        """This rank's row of model `index`; `raw` [layers, experts] is what vLLM would sum."""
        state = self.models[index].state
        return reduce_window(state, raw, self.notes, self.step, self.stall_us)

    def propose(self, index: int, gathered: Any, shape: tuple[int, ...], old: Any) -> Proposal:
        """This rank's vote.

        Args:
            index: of the model.
            gathered: [ranks, n] rows of all models.
            shape: (layers, experts) of the model.
            old: [layers, slots] tensor, the map in force.
        """
        if gathered.shape[0] != self.place.ranks:
            # Scaled since this worker started; who stands where is known from then.
            self.guard.fell_back("the expert-parallel group has another size")
            self._stop_pressing()
            return Proposal((Verdict.VLLM, 0))
        current = np.ascontiguousarray(old.numpy(), dtype=np.int32)
        view = self.models[index]
        counts, stall_us = self._counts_of(index, gathered, shape)
        self._realized(view, counts, current)
        topology = self.place.topology(current.shape[1])
        self._note_sources(counts.sources)
        self.straggling_us = expert_pressure_us(
            view.planner.problem(counts.routing, topology, current)
        )
        view.counts = counts
        if not view.ready:
            return Proposal((Verdict.NOT_READY, 0))
        if not counts.routing.counts.any():
            return Proposal((Verdict.KEEP, 0))
        slow = stall_us / self._modelled_us if stall_us and self._modelled_us else 1.0
        rows, windows = self._expected(view, counts)
        decision = view.planner.decide(rows, topology, current, slow, windows, counts.kinds)
        wrong = verify.problems(decision.placement, topology, *shape)
        if decision.commit and wrong is not None:
            logger.error("Gimbal: refusing what placer %r plans: %s", self.config.placer, wrong)
            return Proposal((Verdict.REFUSE, 0))
        # vLLM commits the old map again where the new one is not taken: the tables are
        # rewritten either way.
        chosen = decision.placement if decision.commit else current
        if self.config.replicas == "near" and self._may_prefer_near(counts.sources):
            view.shares = near_split(counts.routing.counts, chosen, topology)
            view.shares_of = chosen
        else:
            view.shares = None
        if not decision.commit:
            return Proposal((Verdict.KEEP, 0), None, decision, current)
        vote = Verdict.COMMIT, map_hash(verify.digest(chosen))
        return Proposal(vote, _as_map(chosen, old), decision, current)

    def decided(self, index: int, verdict: Verdict, proposal: Proposal) -> None:
        """All ranks have voted, and do what `verdict` says."""
        view = self.models[index]
        view.committed = verdict is Verdict.COMMIT
        if verdict in (Verdict.REFUSE, Verdict.DISAGREE, Verdict.NOT_READY):
            # Ranks that planned differently, or not at all, may have learned differently; all see
            # this outcome.
            view.forget()
            self._modelled_us = 0.0
        if verdict in (Verdict.REFUSE, Verdict.DISAGREE):
            self.guard.fell_back(f"map not committed: {verdict.name.lower()}")
        decision, current = proposal.decision, proposal.current
        if verdict is not Verdict.VLLM and decision is not None and current is not None:
            self._record(index, decision, verdict, current)

    def _counts_of(
        self, index: int, gathered: Any, shape: tuple[int, ...]
    ) -> tuple[SourceCounts, float]:
        """Counts per source of model `index`, and the longest stall any rank measured."""
        gathered = gathered.cpu().numpy()
        offset = sum(row_length(*v.state.logical_replica_count.shape) for v in self.models[:index])
        part = gathered[:, offset : offset + row_length(*shape)]
        rows = split_rows(part, *shape)
        sources = self.sources_of(self.models[index])
        counts = per_source(rows, self.place.ranks_per_source, sources)
        return counts, float(rows.stall_us.max())

    def sources_of(self, view: ModelView) -> Sources:
        """Which tokens the ranks count in a model."""
        return who_counts(view.state.model.moe_layers, self.place.ranks_per_source)

    def _expected(self, view: ModelView, counts: SourceCounts) -> tuple[RoutingCounts, float]:
        """The rows to plan for, and for how many intervals; as measured and 1 without feedback."""
        if not self.feedback:
            return counts.routing, 1.0
        since, view.planned_step = self.step - view.planned_step, self.step
        overlap = window_overlap(since, self.window_size, self.notes.half_life_steps)
        return view.outlook.observe(counts.routing, overlap), view.outlook.windows

    def _note_sources(self, sources: Sources) -> None:
        several = self.place.ranks > self.place.ranks_per_source
        if sources is Sources.UNKNOWN and several and sources.value not in self._said:
            self._said.add(sources.value)
            logger.warning("Gimbal placement: %s", sources.value)
            self.guard.fell_back("source-awareness off")

    def _may_prefer_near(self, sources: Sources) -> bool:
        """Own tables need one rank to choose for a token; see `replicas`."""
        return sources is Sources.PER_RANK and self.place.ranks > 1

    def _realized(self, view: ModelView, counts: SourceCounts, current: IntArray) -> None:
        """Prices the last commit on the counts that followed it."""
        if view.before is None or not counts.routing.counts.any():
            return
        topology = self.place.topology(current.shape[1])
        gain = view.planner.gain_us_per_step(
            counts.routing, topology, view.before, current, counts.kinds
        )
        view.before = None
        view.outlook.realized(view.promised_us, gain)
        self.rebalance_log.amend(realized_gain_us_per_step=gain)
        if self.place.rank == 0 and self.rebalance_log.last is not None:
            logger.info(
                "Gimbal placement: last rearrangement predicted %.1f us per step, realized %.1f",
                self.rebalance_log.last.predicted_gain_us_per_step,
                gain,
            )

    def _record(
        self, index: int, decision: PlacementDecision, verdict: Verdict, current: IntArray
    ) -> None:
        committed = verdict is Verdict.COMMIT
        if committed:
            view = self.models[index]
            view.before, view.promised_us = current, decision.gain_us_per_step
            view.replaced = current
            self._modelled_us = decision.modelled_stall_us
        self.rebalance_log.add(
            RebalanceRecord(
                time_s=self.clock_s() - self._start_s,
                committed=committed,
                reason=decision.reason,
                predicted_gain_us_per_step=decision.gain_us_per_step,
                predicted_stall_us=decision.stall_us,
                realized_gain_us_per_step=None,
                stall_us=None,
                moved_slots=decision.moved_slots,
                received_experts=decision.received_experts,
                balance_before=decision.balance_before,
                balance_after=decision.balance_after,
                local_share_before=decision.local_share_before,
                local_share_after=decision.local_share_after,
            ),
            self.models[index].planner.expert_bytes,
        )
        if (counts := self.models[index].counts) is not None:
            pairs, planned = counts.routing.counts.sum(axis=0), decision.placement
            self.rebalance_log.snapshot(pairs, current, planned, self.place.ranks)
        if self.place.rank == 0:
            logger.info(
                "Gimbal placement: %s, %s; balance %.3f -> %.3f, local share %.3f -> %.3f, "
                "%d experts received",
                "committed" if committed else verdict.name.lower(),
                decision.reason,
                decision.balance_before,
                decision.balance_after,
                decision.local_share_before,
                decision.local_share_after,
                decision.received_experts,
            )

    # A commit.

    def stalled(self, elapsed_us: float) -> None:
        """A rearrangement took `elapsed_us` from serving (all of it, or one layer's share)."""
        if any(view.committed for view in self.models):
            self.stall_us = elapsed_us
            self.rebalance_log.amend(stall_us=elapsed_us)

    def stalled_more(self, elapsed_us: float) -> None:
        """Adds one step's share of an asynchronous rearrangement."""
        self._async_us += elapsed_us

    def committed(self, model_state: Any, old_map: Any, first_layer: int, layers: int) -> None:
        """vLLM has put a new map of `layers` layers in force; `old_map` is what it replaced."""
        self._layers += layers
        part = slice(first_layer, first_layer + layers)
        new_map = model_state.physical_to_logical_map[part]
        if old_map.shape == new_map.shape and not bool((old_map == new_map).all()):
            self.changed_step = self.step
            for meter in (view.meter for view in self.models if view.meter is not None):
                meter.moved()
            experts = model_state.logical_replica_count.shape[1]
            carry_over(model_state.expert_load_window[:, part], old_map, new_map, experts)
        view = next((v for v in self.models if v.state is model_state), None)
        if view is None or view.shares is None or view.shares_of is None:
            return
        in_force = new_map.cpu().numpy()
        if np.array_equal(in_force, view.shares_of[part]):
            write_tables(model_state, in_force, view.shares[self.place.source, part], first_layer)


def _as_map(placement: IntArray, like: Any) -> Any:
    """`placement` as a tensor of the type that vLLM's map `like` has."""
    import torch

    return torch.from_numpy(placement.astype(np.int64)).to(like.dtype)
