"""All ranks commit the same map or none: one tiny collective per decision.

A map that differs on one rank sends tokens to weights of other experts, silently. So before a
map is returned to vLLM every rank publishes its vote and the map's hash.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import IntEnum

Vote = tuple[int, int]
"""(`Verdict`, 63-bit hash of the proposed map; 0 for no map)."""
Gather = Callable[[Vote], Sequence[Vote]]
"""Publishes this rank's vote and returns everybody's, in rank order."""


class Verdict(IntEnum):
    """What one rank wants, and what the group does."""

    COMMIT = 0
    KEEP = 1  # the gain does not pay, or this rank could not plan
    REFUSE = 2  # the proposed map is not valid
    VLLM = 3  # this rank cannot tell who stands where: vLLM's own policy decides
    DISAGREE = 4  # never voted: the hashes differ
    NOT_READY = 5  # this rank compiles its planner, or failed: everybody waits for the next time
    OFF = 6  # the level is switched off on this rank: vLLM's own policy decides from now on


def outcome(votes: Sequence[Vote]) -> Verdict:
    """What the group does: the most cautious vote, and DISAGREE when maps differ."""
    verdicts = [Verdict(v) for v, _ in votes]
    for cautious in (Verdict.OFF, Verdict.VLLM, Verdict.NOT_READY, Verdict.REFUSE):
        if cautious in verdicts:
            return cautious
    if Verdict.KEEP in verdicts:
        # Ranks that plan from the same bytes either all keep or all commit.
        return Verdict.KEEP if len(set(verdicts)) == 1 else Verdict.DISAGREE
    return Verdict.COMMIT if len({h for _, h in votes}) == 1 else Verdict.DISAGREE


def map_hash(digest: str) -> int:
    """63 bits of a hexadecimal digest: fits a signed 64-bit integer."""
    return int(digest, 16) & (2**63 - 1)


def gather_over(group_of: Callable[[], object]) -> Gather:
    """A `Gather` over the CPU process group that `group_of` returns when it is called."""

    def gather(vote: Vote) -> Sequence[Vote]:
        import torch
        from torch.distributed import all_gather

        group = group_of()
        mine = torch.tensor(vote, dtype=torch.int64)
        votes = [torch.empty_like(mine) for _ in range(group.size())]  # type: ignore[attr-defined]
        all_gather(votes, mine, group=group)
        return [(int(v[0]), int(v[1])) for v in votes]

    return gather
