"""An arm as the simulator runs it: the sections in force, and its flags on the cluster."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from gimbal.core.config import DispatchConfig, FeedbackConfig, PlacementConfig, QueueConfig
from gimbal.core.errors import InputError
from gimbal.core.numbers import whole
from gimbal.core.snapshot import MAX_ENGINES
from gimbal.report.arms import Arm, Simulated
from gimbal.sim.cluster import Cluster


@dataclass(frozen=True, slots=True)
class SimPolicies:
    """What decides in one run; where a level is off, vLLM's own.

    Attributes:
        dispatch: section in force; policy ``vllm`` without level `dispatch`.
        fresh_signals: dispatch reads what engines publish at the moment it decides; False gives it
            the coordinator's request counts of up to 100 ms ago, as vLLM's own path does.
        queue: section in force; ordering ``fcfs`` without level `queue`.
        placement: section in force; without level `placement` the placer is ``eplb``, or ``static``
            where nothing moves experts.
        places: level `placement` is on and there is something that moves experts.
        feedback: section in force, None without level `feedback`.
        simulated: see there.
    """

    dispatch: DispatchConfig
    fresh_signals: bool
    queue: QueueConfig
    placement: PlacementConfig
    places: bool
    feedback: FeedbackConfig | None = None
    simulated: Simulated = field(default_factory=Simulated)


_OF_ROLE: dict[tuple[str, str], dict[str, Any]] = {
    ("dynamo", "prefill"): {"track_active_blocks": False},
    ("dynamo", "decode"): {"prefill_load_scale": 0.0},
}
"""What a dispatch policy's project sets by itself with prefill and decode apart: policy and role,
options. Source: Dynamo 1.6, "Disaggregated Serving" of its router's documentation (a prefill router
without block tracking, a decode router without overlap scores and prefill tokens)."""


def policies_of(arm: Arm, cluster: Cluster, role: str = "") -> SimPolicies:
    """What decides when `arm` runs on `cluster`; raises InputError for a bad configuration.

    Args:
        role: of the engines, with prefill and decode apart.
    """
    config, simulated = arm.gimbal_config(), arm.simulated or Simulated()
    levels = config.levels if config.enabled else ()
    if simulated.pool and (simulated.affinity != "none" or {"dispatch", "feedback"} & {*levels}):
        raise InputError(
            f"arm {arm.name}: a pool leaves nothing to dispatch, feedback and affinity"
        )
    # A pool is no server, and the coordinator tells of any number of engines.
    if cluster.dp > MAX_ENGINES and not simulated.pool and arm.signals == "board":
        need = [level for level in levels if level != "placement"]
        if need:
            raise InputError(
                f"arm {arm.name}: {cluster.name} has {cluster.dp} engines: levels "
                f"{', '.join(need)} serve at most {MAX_ENGINES}"
            )
    dispatch, queue, placement = config.dispatch, config.queue, config.placement
    if "dispatch" not in levels:
        dispatch = replace(dispatch, policy="vllm", options={})
    own = _OF_ROLE.get((dispatch.policy, role), {})
    dispatch = replace(dispatch, options={**own, **dispatch.options})
    if "queue" not in levels:
        queue = QueueConfig(ordering="fcfs")
    # As on a server: without EPLB there is nothing that moves experts. An oracle places them
    # before the run.
    moves = cluster.enable_eplb or simulated.oracle
    places = moves and "placement" in levels
    if not places:
        placement = PlacementConfig(placer="eplb" if moves else "static")
    return SimPolicies(
        dispatch,
        # Policy `vllm` is vLLM's own method on a server, and reads what vLLM tells it.
        fresh_signals=arm.signals == "board" and dispatch.policy != "vllm",
        queue=queue,
        placement=placement,
        places=places,
        feedback=config.feedback if "feedback" in levels else None,
        simulated=simulated,
    )


_SWITCHES = {
    "--enable-eplb": "enable_eplb",
    "--enable-prefix-caching": "enable_prefix_caching",
}
_NUMBERS = {
    "--max-num-batched-tokens": ("max_num_batched_tokens", 1),
    "--max-num-seqs": ("max_num_seqs", 1),
    "--long-prefill-token-threshold": ("long_prefill_token_threshold", 0),
    "--prefill-schedule-interval": ("prefill_schedule_interval", 1),
}
"""Flag, the cluster's field, its least value."""
FLAGS = (*_NUMBERS, *(word for flag in _SWITCHES for word in (flag, f"--no-{flag[2:]}")))
"""vLLM's flags that the simulator understands."""


def with_flags(cluster: Cluster, arm: Arm) -> Cluster:
    """`cluster` with the arm's vLLM flags in force; raises InputError naming arm and flag."""
    changes: dict[str, int | bool] = {}
    words = iter(arm.flags)
    for word in words:
        flag, equals, text = word.partition("=")
        flag = flag.replace("_", "-")
        where = f"arm {arm.name}: {flag}"
        if flag in _NUMBERS:
            field_name, least = _NUMBERS[flag]
            text = text if equals else next(words, "")
            changes[field_name] = whole(text, f"{where} ", least)
        elif flag in FLAGS and not equals:
            on = flag in _SWITCHES
            changes[_SWITCHES[flag if on else f"--{flag[5:]}"]] = on
        else:
            raise InputError(
                f"arm {arm.name}: the simulator does not understand {word!r} (it understands "
                f"{', '.join(FLAGS)})"
            )
    return replace(cluster, **changes)  # type: ignore[arg-type]
