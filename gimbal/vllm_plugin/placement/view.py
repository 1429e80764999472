"""What a worker knows: where it stands, each model's last window and what was decided on it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gimbal.core.contracts import IntArray, Topology
from gimbal.core.feedback.outlook import Outlook
from gimbal.core.placement.planner import Planner
from gimbal.vllm_plugin.placement.rows import SourceCounts
from gimbal.vllm_plugin.placement.sending import SendMeter


@dataclass(frozen=True, slots=True)
class Place:
    """Where this worker stands: its expert-parallel rank among `ranks`, and the group's shape."""

    rank: int
    ranks: int
    ranks_per_source: int
    ranks_per_node: int

    @property
    def source(self) -> int:
        return self.rank // self.ranks_per_source

    def topology(self, slots: int) -> Topology:
        return Topology(self.ranks, slots // self.ranks, self.ranks_per_source, self.ranks_per_node)


@dataclass(slots=True)
class ModelView:
    """One model's last gathered counts and what was decided on them."""

    state: Any  # vLLM's EplbModelState
    planner: Planner
    meter: SendMeter | None = None  # None without feedback
    outlook: Outlook = field(default_factory=Outlook)
    planned_step: int = 0  # engine step of the last window that was planned on
    counts: SourceCounts | None = None
    shares: np.ndarray | None = None  # [sources, layers, slots] of `near_split`, for `shares_of`
    shares_of: IntArray | None = None
    before: IntArray | None = None  # the map that the last committed one replaced, until priced
    replaced: IntArray | None = None  # the same for good, for people
    promised_us: float = 0.0  # gain per step that it was replaced for
    committed: bool = False
    ready: bool = True  # False while the planner is compiled in another thread

    def forget(self) -> None:
        """Starts anew, as every rank does at the same time: what was learned from past windows
        must be the same everywhere."""
        self.planner.forget()
        self.outlook = Outlook()
        self.before = None  # what was promised for it is another rank's realized gain, or nobody's
