"""Arms: named policy sets of a simulated run, the ablations of the paper among them."""

from __future__ import annotations

from dataclasses import dataclass

from gimbal.core.config import QueueConfig
from gimbal.core.errors import InputError, nearest


@dataclass(frozen=True, slots=True)
class Arm:
    """One policy set.

    Attributes:
        dispatch: policy name from `gimbal.core.dispatch.POLICIES`.
        fresh_signals: the policy reads the board at the moment it decides; False gives it the
            coordinator's request counts of up to 100 ms ago, as vLLM's own path does.
        ordering: waiting-queue ordering by name.
        graph_steps: as in the configuration's section `queue`; of an arm with Gimbal's ordering, on
            a profile with CUDA graphs.
        interval_backlog_steps: as in the configuration's section `queue`; says something only on a
            cluster with a ``prefill_schedule_interval``.
        placer: ``static`` for vLLM's initial placement throughout, ``gimbal`` for the planner
            behind its gain gate, or another placer by name, which always commits. MoE-Tuner's and
            Sem-MoE's dispatch and queue are vLLM's but for `affinity`.
        feedback: pressure enters dispatch; the source mix and its stability enter placement.
        pressure: what an engine is pressed by: ``sending`` (what dispatch can relieve, see
            docs/feedback.md) or ``owner`` (straggling of the ranks it owns, as in the paper).
        affinity: ``local`` prices the pairs that leave an engine in dispatch, ``home`` sends a
            domain to its home engine as Sem-MoE does.
        oracle: the placer plans once, before the run, on the run's own expected routing.
    """

    name: str
    dispatch: str = "vllm"
    fresh_signals: bool = False
    ordering: str = "fcfs"
    placer: str = "static"
    feedback: bool = False
    pressure: str = "sending"
    affinity: str = "none"
    oracle: bool = False
    interval_backlog_steps: float = 0.0
    graph_steps: float = QueueConfig().graph_steps


def _dispatch_only(policy: str) -> Arm:
    return Arm(policy, dispatch=policy, fresh_signals=True)


ARMS = {
    arm.name: arm
    for arm in (
        Arm("vllm", placer="eplb"),
        Arm("vllm-no-eplb"),
        Arm("vllm-legacy", dispatch="vllm-legacy", placer="eplb"),
        Arm("vllm-legacy-no-eplb", dispatch="vllm-legacy"),
        *map(_dispatch_only, ("round-robin", "total-tokens", "lmetric", "dynamo", "llm-d")),
        Arm("gimbal-dispatch", "gimbal", True),
        Arm("gimbal-queue", ordering="gimbal"),
        Arm("sjf", ordering="sjf"),
        Arm("hrrn", ordering="hrrn"),
        Arm("gimbal-dp", "gimbal", True, "gimbal"),
        Arm("gimbal-paced", "gimbal", True, "gimbal", interval_backlog_steps=8.0),
        Arm("gimbal-ep", placer="gimbal"),
        Arm("gimbal-no-feedback", "gimbal", True, "gimbal", "gimbal"),
        Arm("gimbal", "gimbal", True, "gimbal", "gimbal", True),
        Arm("gimbal-no-graphs", "gimbal", True, "gimbal", "gimbal", True, graph_steps=0.0),
        Arm("gimbal-owner", "gimbal", True, "gimbal", "gimbal", True, "owner"),
        Arm("gimbal-affinity", "gimbal", True, "gimbal", "gimbal", True, affinity="local"),
        Arm("moe-tuner", placer="moe-tuner", oracle=True),
        Arm("sem-moe", placer="sem-moe", affinity="home", oracle=True),
    )
}


def get_arm(name: str) -> Arm:
    """The arm called `name`; raises InputError naming the nearest one."""
    if name not in ARMS:
        raise InputError(f"unknown arm {name!r}{nearest(name, ARMS)}")
    return ARMS[name]
