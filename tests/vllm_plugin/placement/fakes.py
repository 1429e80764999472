"""A group of members in one process: vLLM's state faked, its calls made in vLLM's order."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from gimbal.core.config import PlacementConfig
from gimbal.core.guard import LevelGuard
from gimbal.core.placement.planner import ModelFacts, planner_for
from gimbal.testing import placement
from gimbal.vllm_plugin.placement.controller import Controller
from gimbal.vllm_plugin.placement.hook import _meter
from gimbal.vllm_plugin.placement.member import Member
from gimbal.vllm_plugin.placement.view import ModelView, Place
from gimbal.vllm_plugin.placement.window import to_logical

LAYERS, EXPERTS, WINDOW, TABLE = 2, 8, 16, 1024


class VllmPolicy:
    """Stands for vLLM's own policy: moves everything by one slot, so that tests see it ran."""

    @staticmethod
    def rebalance_experts(weight: Any, *rest: Any) -> Any:
        return torch.roll(rest[-1], 1, dims=1)


def model_state(experts: np.ndarray) -> SimpleNamespace:
    """vLLM's state of a model whose slots hold `experts` [layers, slots]."""
    slots = experts.shape[1]
    return SimpleNamespace(
        model=SimpleNamespace(moe_layers=[SimpleNamespace()]),
        physical_to_logical_map=torch.from_numpy(experts.astype(np.int64)),
        logical_to_physical_map=torch.full((LAYERS, EXPERTS, TABLE), -1),
        logical_replica_count=torch.zeros(LAYERS, EXPERTS, dtype=torch.long),
        expert_load_window=torch.zeros(WINDOW, LAYERS, slots, dtype=torch.int32),
        rebalanced=False,
    )


class Group:
    """`ranks` workers, one per rank, with the same model."""

    def __init__(
        self,
        ranks: int,
        redundant: int = 0,
        ranks_per_source: int = 1,
        feedback: bool = False,
        **config: Any,
    ) -> None:
        first = placement(LAYERS, EXPERTS + redundant, EXPERTS)
        self.votes: list[Any] = [None] * ranks
        facts = ModelFacts(2e5, 2, 512.0, True, "allgather_reducescatter", 1000)
        settings = PlacementConfig(**({"backend": "all2all", "gate": 0.0} | config))
        self.workers = [
            Controller(
                config=settings,
                place=Place(rank, ranks, ranks_per_source, ranks),
                guard=LevelGuard("placement", max_consecutive=3),
                window_size=WINDOW,
                clock_s=lambda: 0.0,
                feedback=feedback,
            )
            for rank in range(ranks)
        ]
        self.members = [Member(w.guard, lambda vote: [vote], VllmPolicy) for w in self.workers]
        for worker, member in zip(self.workers, self.members, strict=True):
            member.controller = worker
            planner = planner_for(settings, facts)
            meter = _meter(planner, worker.place) if feedback else None
            worker.models.append(ModelView(model_state(first), planner, meter))

    def run_step(self, counts: np.ndarray, prefill: int = 16, decode: int = 0) -> None:
        """Every rank records its own of `counts` [ranks, layers, experts]."""
        for worker, own in zip(self.workers, counts, strict=True):
            state = worker.models[0].state
            slot = worker.step % WINDOW
            worker.step += 1
            worker.batch = (prefill, decode)
            worker.recorded(slot)
            record(state, slot, own)
            worker.measure(slot)

    def rearrange(self) -> list[np.ndarray]:
        """One rearrangement in vLLM's order; returns each rank's map and commits it."""
        raws = []
        for worker, member in zip(self.workers, self.members, strict=True):
            member.begin(True)
            state = worker.models[0].state
            index = state.physical_to_logical_map.long()
            raws.append(to_logical(state.expert_load_window, index, EXPERTS).sum(dim=0))
        rows: list[Any] = []
        for member, raw in zip(self.members, raws, strict=True):
            member.gather([raw], lambda row: rows.append(row) or torch.stack([row]))
        for member, raw in zip(self.members, raws, strict=True):
            sums = member.gather([raw], lambda _row: torch.stack(rows))
            assert torch.equal(sums[0], torch.stack(raws).sum(dim=0).to(raw.dtype))
        maps = self._plan(sums[0])
        for worker, member, new in zip(self.workers, self.members, maps, strict=True):
            state = worker.models[0].state
            old = state.physical_to_logical_map.clone()
            state.physical_to_logical_map = torch.from_numpy(new)
            fill_tables(state)
            worker.committed(state, old, 0, LAYERS)
            worker.stalled(1000.0)
            member.end()
        return maps

    def _plan(self, weight: Any) -> list[np.ndarray]:
        """Two passes, as votes need everybody's: the first collects them, the second decides."""
        slots = self.workers[0].models[0].state.physical_to_logical_map.shape[1]
        votes = []
        for index, (worker, member) in enumerate(zip(self.workers, self.members, strict=True)):
            view = worker.models[0]
            before, last = view.before, worker.rebalance_log.last
            learned = copy.deepcopy(view.outlook), view.planned_step
            vote = member._propose(0, weight, view.state.physical_to_logical_map).vote
            votes.append(self.votes[index] or vote)
            view.before, worker.rebalance_log.last = before, last
            view.outlook, view.planned_step = learned
        maps = []
        for worker, member in zip(self.workers, self.members, strict=True):
            member.vote = lambda _vote: votes
            old = worker.models[0].state.physical_to_logical_map
            result = member.rebalance_experts(weight, slots, 1, 1, len(self.workers), old)
            maps.append(result.numpy())
        return maps


def record(state: Any, slot: int, counts: np.ndarray) -> None:
    """Writes a step's `counts` [layers, experts] into the window, at each expert's first slot."""
    state.expert_load_window[slot] = 0
    for layer, table in enumerate(state.physical_to_logical_map.tolist()):
        for expert in range(EXPERTS):
            state.expert_load_window[slot, layer, table.index(expert)] = int(counts[layer, expert])


def fill_tables(state: Any) -> None:
    """vLLM's own logical_to_physical_map after a commit: replicas in slot order."""
    state.logical_to_physical_map.fill_(-1)
    state.logical_replica_count.zero_()
    for layer, slots in enumerate(state.physical_to_logical_map.tolist()):
        for slot, expert in enumerate(slots):
            count = int(state.logical_replica_count[layer, expert])
            state.logical_to_physical_map[layer, expert, count] = slot
            state.logical_replica_count[layer, expert] += 1


def skewed(ranks: int) -> np.ndarray:
    """[ranks, layers, experts]: source r asks for experts that the even map puts elsewhere."""
    counts = np.ones((ranks, LAYERS, EXPERTS))
    per = EXPERTS // ranks
    for rank in range(ranks):
        first = (rank + 1) % ranks * per
        counts[rank, :, first : first + per] = 40.0
    return counts
