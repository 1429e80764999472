"""One rank's part in what all ranks do together, which it plays whatever fails.

A rank that skips a collective, or takes another map than the others, hangs or corrupts them all.
So every collective of the level stands here, in plain arithmetic: the rows that are gathered where
vLLM sums loads, and the vote on a map. What may fail is the `Controller`'s, behind the guard. A
rank that cannot reduce its window sends what vLLM would have summed; one that cannot plan votes
for the old map; one that is switched off votes `Verdict.OFF`, and then all ranks leave placement
to vLLM, from the same vote on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from gimbal.core.guard import LevelGuard
from gimbal.vllm_plugin.placement.agreement import Gather, Verdict, outcome
from gimbal.vllm_plugin.placement.controller import Controller, Proposal
from gimbal.vllm_plugin.placement.rows import PLANES, SCALARS

logger = logging.getLogger("vllm.gimbal")

_MEMBER = "_gimbal_member"


class Member:
    """What an ``EplbState`` asks in place of vLLM's policy.

    Args:
        guard: counts fallbacks.
        vote: publishes this rank's vote to all ranks, see `agreement`.
        fallback: vLLM's own policy, used where the level is off.

    Attributes:
        controller: this rank's counts and plans; None where it could not be made.
        mode: "gather" while vLLM sums loads for a rearrangement of ours.
        off: all ranks have left placement to vLLM for good.
        fallbacks_sent: fallbacks of `guard` that the scheduler knows of.
        off_sent: the scheduler knows that this rank does not act any more.
    """

    def __init__(self, guard: LevelGuard, vote: Gather, fallback: Any) -> None:
        self.guard = guard
        self.vote = vote
        self.fallback = fallback
        self.controller: Controller | None = None
        self.mode = "idle"
        self.off = False
        self.fallbacks_sent = 0
        self.off_sent = False
        self._own_turn = False
        self._next_model = 0
        self._models = 0
        self._gathered: Any = None  # [ranks, n] rows of all models, on vLLM's device, until planned

    @property
    def acting(self) -> Controller | None:
        """The controller while this rank's level is on."""
        return None if self.off or self.guard.disabled else self.controller

    def begin(self, ours: bool) -> None:
        """vLLM starts a rearrangement; `ours` is False for its profile run and elastic scaling."""
        self._own_turn = ours and not self.off
        self.mode = "gather" if self._own_turn else "pass"
        self._next_model = 0

    def end(self) -> None:
        self.mode = "idle"

    def gather(self, raw: list[Any], all_gather: Callable[[Any], Any]) -> list[Any]:
        """Gathers rows instead of summing them; returns the sums vLLM expects.

        Args:
            raw: per model [layers, experts] this rank's summed window.
            all_gather: [n] vector -> [ranks, n]; called exactly once, whatever fails here.
        """
        import torch

        rows = torch.cat([self._row(index, plane) for index, plane in enumerate(raw)])
        self._models, self._gathered = len(raw), None  # those of a window that nobody planned for
        self._gathered = all_gather(rows)
        sums, offset = [], 0
        for plane in raw:
            part = self._gathered[:, offset : offset + plane.numel()].sum(dim=0)
            sums.append(part.reshape(plane.shape).to(plane.dtype))
            offset += PLANES * plane.numel() + SCALARS
        return sums

    def _row(self, index: int, plane: Any) -> Any:
        import torch

        controller, row = self.acting, None
        if controller is not None:
            row = self.guard.run("window could not be reduced", controller.row, index, plane)
        length = PLANES * plane.numel() + SCALARS
        if row is None or row.shape != (length,):
            row = torch.zeros(length, dtype=torch.float64, device=plane.device)
            row[: plane.numel()] = plane.reshape(-1)
        return row

    def rebalance_experts(
        self,
        weight: Any,
        num_replicas: int,
        num_groups: int,
        num_nodes: int,
        num_ranks: int,
        old_global_expert_indices: Any = None,
    ) -> Any:
        """vLLM's policy interface: physical_to_logical [layers, slots], the same on every rank."""
        old = old_global_expert_indices
        arguments = weight, num_replicas, num_groups, num_nodes, num_ranks, old
        if self.off or not self._own_turn or old is None:
            return self.fallback.rebalance_experts(*arguments)
        index, self._next_model = self._next_model, self._next_model + 1
        proposal = self._propose(index, weight, old)
        if self._next_model == self._models:
            self._gathered = None  # too large to lie there until the next rearrangement
        verdict = outcome(self.vote(proposal.vote))
        if verdict is Verdict.OFF:
            self.off = True
            logger.error("Gimbal placement: off on some rank, so all ranks leave experts to vLLM")
        elif (controller := self.acting) is not None:
            self.guard.run("not noted", controller.decided, index, verdict, proposal)
        if verdict in (Verdict.OFF, Verdict.VLLM):
            return self.fallback.rebalance_experts(*arguments)
        return proposal.placement if verdict is Verdict.COMMIT else old.clone()

    def _propose(self, index: int, weight: Any, old: Any) -> Proposal:
        """Whatever goes wrong becomes a vote for the old map."""
        controller = self.acting
        if controller is None:
            return Proposal((Verdict.OFF, 0))
        shape = tuple(weight.shape)
        found = self.guard.run("no plan", controller.propose, index, self._gathered, shape, old)
        # What this window taught the others is lost here.
        return Proposal((Verdict.NOT_READY, 0)) if found is None else found


def member_of(state: Any) -> Member | None:
    """The member that an ``EplbState`` or an ``EplbModelState`` belongs to."""
    found: Member | None = getattr(state, _MEMBER, None)
    return found


def join(state: Any, member: Member) -> None:
    """`state` belongs to `member`."""
    setattr(state, _MEMBER, member)
