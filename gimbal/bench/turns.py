"""In what order arms take turns, and how many servers that starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gimbal.bench.arms import ServerSpec, server_spec
from gimbal.report.arms import Arm
from gimbal.report.compare import turns


@dataclass(frozen=True, slots=True)
class Turn:
    """One run of one arm."""

    repeat: int
    arm: Arm
    spec: ServerSpec


def plan_turns(arms: Sequence[Arm], repeats: int, share: bool) -> list[Turn]:
    """The runs in order: within a server Williams turns, servers there and back.

    Going through servers in one direction and then in the other starts each one but the first
    and last at most once per repeat, and lets a drift of the machine hit all of them alike.
    """
    by_name = {arm.name: arm for arm in arms}
    specs = {arm.name: server_spec(arm, share) for arm in arms}
    servers = list(dict.fromkeys(specs.values()))
    if len(servers) == len(arms):
        rows = [turns([*by_name], 1)[0][:: 1 if k % 2 == 0 else -1] for k in range(repeats)]
    else:
        rows = turns([*by_name], repeats)
    plan = []
    for repeat, row in enumerate(rows):
        for spec in servers if repeat % 2 == 0 else servers[::-1]:
            plan += [Turn(repeat, by_name[n], spec) for n in row if specs[n] == spec]
    return plan


def count_starts(plan: Sequence[Turn], resident: int) -> int:
    """Server starts that `plan` needs with `resident` servers alive at once."""
    alive: list[ServerSpec] = []
    starts = 0
    for turn in plan:
        if turn.spec in alive:
            alive.remove(turn.spec)
        else:
            starts += 1
            alive = alive[-(resident - 1) :] if resident > 1 else []
        alive.append(turn.spec)
    return starts
