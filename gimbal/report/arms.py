"""Arms: named sides of a comparison, the same for live servers and for the simulator.

An arm is a Gimbal configuration and vLLM flags. Without level `placement` vLLM's own EPLB places
experts, where the server's flags or the simulated cluster enable it; without level `dispatch` or
`queue` vLLM dispatches or orders. What only the simulator can do stands apart (`Simulated`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from gimbal.core.config import LEVELS, GimbalConfig, parse_config
from gimbal.core.errors import InputError, nearest

SIGNALS = ("board", "coordinator")


@dataclass(frozen=True, slots=True)
class Simulated:
    """What an arm does that no server can.

    Attributes:
        pressure: what an engine is pressed by: ``sending`` (what dispatch can relieve, see
            docs/feedback.md) or ``owner`` (straggling of the ranks it owns, as in the paper).
        affinity: ``local`` prices the pairs that leave an engine in dispatch, ``home`` sends a
            domain to its home engine as Sem-MoE does, ``none`` neither.
        oracle: the placer plans once, before the run, on the run's own expected routing.
        pool: all engines are one, perfectly balanced: one queue, one KV pool and one prefix cache
            of everything they have, and each step's work spread evenly over them. Nothing is left
            to dispatch. Records name engines in turn.
    """

    pressure: Literal["sending", "owner"] = "sending"
    affinity: Literal["none", "local", "home"] = "none"
    oracle: bool = False
    pool: bool = False


@dataclass(frozen=True, slots=True)
class Arm:
    """One side of a comparison.

    Attributes:
        name: what reports call it.
        description: one sentence.
        config: Gimbal's configuration, as in its YAML file; without ``levels`` all are on.
        flags: vLLM flags added to the server's, or in force on the simulated cluster.
        signals: what dispatch reads of the engines where level `dispatch` is on: ``board``, what
            they publish, at the moment of the decision; or, in the simulator, ``coordinator``: the
            request counts of up to 100 ms ago that vLLM's own dispatch reads.
        simulated: set for an arm that only the simulator can run.
    """

    name: str
    description: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    flags: tuple[str, ...] = ()
    signals: str = "board"
    simulated: Simulated | None = None

    @property
    def levels(self) -> tuple[str, ...]:
        """Gimbal's levels that are on; none leaves every decision to vLLM."""
        return tuple(self.config.get("levels", LEVELS))

    def gimbal_config(self) -> GimbalConfig:
        """The configuration, checked; raises InputError that names the arm and the key."""
        return parse_config(self.config, f"arm {self.name}")

    def to_json(self) -> dict[str, Any]:
        """For records; `gimbal.report.arms_file.parse_arm` reads it back."""
        values: dict[str, Any] = {
            "description": self.description,
            "flags": list(self.flags),
            "signals": self.signals,
            "config": json.loads(json.dumps(dict(self.config))) | {"levels": list(self.levels)},
        }
        if self.simulated is not None:
            values["simulated"] = {
                key: getattr(self.simulated, key) for key in self.simulated.__slots__
            }
        return values


def _policy(name: str, description: str) -> Arm:
    """A dispatch policy alone."""
    return Arm(name, description, {"levels": ["dispatch"], "dispatch": {"policy": name}})


def _ordering(name: str, description: str) -> Arm:
    """A queue ordering alone."""
    return Arm(name, description, {"levels": ["queue"], "queue": {"ordering": name}})


def _legacy(name: str, description: str, *flags: str) -> Arm:
    config = {"levels": ["dispatch"], "dispatch": {"policy": "vllm-legacy"}}
    return Arm(name, description, config, flags, signals="coordinator")


def _oracle(name: str, description: str, affinity: Literal["none", "home"] = "none") -> Arm:
    config = {"levels": ["placement"], "placement": {"placer": name}}
    return Arm(name, description, config, simulated=Simulated(affinity=affinity, oracle=True))


_NO_EPLB = "--no-enable-eplb"

ARMS = {
    arm.name: arm
    for arm in (
        Arm(
            "vllm",
            "vLLM as it is; its EPLB places experts where the server or the cluster enables it",
            {"levels": []},
        ),
        Arm("vllm-no-eplb", "vLLM with experts where they start", {"levels": []}, (_NO_EPLB,)),
        _legacy("vllm-legacy", "vLLM's dispatch before July 2026, the paper's baseline"),
        _legacy("vllm-legacy-no-eplb", "the same with experts where they start", _NO_EPLB),
        _policy("round-robin", "engines in turn"),
        _policy("total-tokens", "SGLang: the engine with the fewest tokens held and queued"),
        _policy("lmetric", "LMetric, vllm-router's kv_aware: prefill tokens times requests"),
        _policy("dynamo", "Dynamo's KV router: blocks to prefill and blocks in use"),
        _policy("llm-d", "llm-d's default scorers: queue, KV usage, cached prefix"),
        Arm("gimbal-dispatch", "Gimbal's dispatch alone", {"levels": ["dispatch"]}),
        Arm("gimbal-queue", "Gimbal's queue alone", {"levels": ["queue"]}),
        _ordering("sjf", "shortest uncached prompt first"),
        _ordering("hrrn", "highest response ratio next"),
        Arm("gimbal-dp", "Gimbal's dispatch and queue", {"levels": ["dispatch", "queue"]}),
        Arm("gimbal-ep", "Gimbal's placement alone", {"levels": ["placement"]}),
        Arm(
            "gimbal-no-feedback",
            "Gimbal without what its levels tell each other",
            {"levels": ["dispatch", "queue", "placement"]},
        ),
        Arm("gimbal", "Gimbal as configured: all levels, or those of --levels"),
        Arm(
            "gimbal-no-graphs",
            "Gimbal without keeping prefill to steps that replay CUDA graphs",
            {"queue": {"graph_steps": 0.0}},
        ),
        Arm(
            "gimbal-owner",
            "Gimbal with the paper's pressure, by the ranks that an engine owns",
            simulated=Simulated(pressure="owner"),
        ),
        Arm(
            "gimbal-affinity",
            "Gimbal with the bytes that leave an engine priced in dispatch",
            simulated=Simulated(affinity="local"),
        ),
        Arm(
            "ideal-pool",
            "Gimbal's queue with all engines one perfectly balanced pool: what dispatch could win",
            {"levels": ["queue"]},
            simulated=Simulated(pool=True),
        ),
        _oracle("moe-tuner", "MoE-Tuner's placement, told the run's routing beforehand"),
        _oracle("sem-moe", "Sem-MoE's placement and home engines, told the same", "home"),
    )
}
"""Every built-in arm by name."""

_FORMER = {"gimbal-dispatch-queue": "gimbal-dp"}


def get_arm(name: str, known: Mapping[str, Arm] = ARMS) -> Arm:
    """The arm called `name`; raises InputError naming the nearest one."""
    if name not in known:
        former = _FORMER.get(name)
        hint = nearest(name, known) if former is None else f" (did you mean {former!r}?)"
        raise InputError(f"unknown arm {name!r}{hint}")
    return known[name]
