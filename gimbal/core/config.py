"""Gimbal's configuration: one schema for the YAML file, the flags and ``additional_config``.

Each level has one frozen dataclass; ``help`` metadata is what ``gimbal config`` prints. Unknown
keys are refused with the nearest valid one, wrong types with the key's full path. A policy's own
options stand under ``options`` beside its name and are checked by the policy's own dataclass.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from gimbal.core.dispatch import POLICIES
from gimbal.core.endpoints import check_name, parse_endpoints, read_secret
from gimbal.core.errors import InputError, nearest
from gimbal.core.options import (
    Count,
    Multiplier,
    NotNegative,
    Port,
    Positive,
    PositiveCount,
    complaint,
    option,
)
from gimbal.core.placement import PLACERS
from gimbal.core.placement.backends import BACKENDS, REPLICA_CHOICES
from gimbal.core.queue import ORDERINGS
from gimbal.core.registry import Registry

logger = logging.getLogger("vllm.gimbal")

LEVELS = ("dispatch", "queue", "placement", "feedback")


def policy_options(help: str) -> Any:
    """A field for the options of the policy that the section names."""
    return field(default_factory=dict, metadata={"help": help})


@dataclass(frozen=True, slots=True)
class DispatchConfig:
    """Level `dispatch`: which engine a request goes to."""

    policy: str = option("gimbal", f"dispatch policy: {', '.join(POLICIES)}, or module:Class")
    options: Mapping[str, Any] = policy_options("the policy's own options")
    max_signal_age_ms: Positive = option(2000.0, "older snapshots are not trusted")
    prefix_chunks: Count = option(1_000_000, "prompt chunks held in the prefix index")
    prefix_chunk_tokens: PositiveCount = option(
        64, "tokens per chunk; shorter shared prefixes are not seen"
    )
    sessions: Count = option(65_536, "conversations whose engine is remembered")


@dataclass(frozen=True, slots=True)
class QueueConfig:
    """Level `queue`: the order of an engine's waiting requests and prefill budget.

    Options that say "where the ordering can" need a capability that the ordering declares
    (`contracts.OrderingTraits`); of the built-in ones `gimbal` has them all.
    """

    ordering: str = option(
        "gimbal", f"order of the waiting queue: {', '.join(ORDERINGS)}, or module:Class"
    )
    options: Mapping[str, Any] = policy_options("the ordering's own options")
    max_wait_s: NotNegative = option(
        60.0, "who waited longer goes first, oldest first, where the ordering can; 0 never"
    )
    priority_tokens: NotNegative = option(
        0.0, "prompt tokens one priority level is worth; 0 keeps classes strictly apart"
    )
    in_batch: bool = option(
        True, "share each step's prefill budget by the same order, where the ordering can"
    )
    pass_steps: Count = option(
        32, "steps a request without KV blocks may be passed, where the ordering can; 0 never"
    )
    pass_s: NotNegative = option(1.0, "seconds a request without KV blocks may be passed")
    room_tokens: Count = option(
        64,
        "tokens of growth of each running request for which admission leaves KV memory free, where "
        "the ordering can; 0: vLLM's rule, what fits now is admitted",
    )
    graph_steps: NotNegative = option(
        2.0,
        "prefill a backlog that fits into this many steps in steps that replay CUDA graphs, where "
        "the ordering can and measured steps say that it pays; 0 never",
    )
    step_budget: bool = option(
        True,
        "bound the prefill that rides along with decodes by what they bear and what the backlog "
        "needs, where the ordering can; false: vLLM's rule, a full step",
    )
    slo_ttft_ms: NotNegative = option(
        0.0, "TTFT target: a step's prefill is the least that keeps it (step_budget); 0: none"
    )
    slo_tpot_ms: NotNegative = option(
        0.0, "TPOT target: prefill makes no step longer, but for TTFT (step_budget); 0: none"
    )


@dataclass(frozen=True, slots=True)
class PlacementConfig:
    """Level `placement`: where experts live."""

    placer: str = option("gimbal", f"placer: {', '.join(PLACERS)}, or module:Class")
    options: Mapping[str, Any] = policy_options("the placer's own options")
    alpha: Multiplier = option(1.0, "multiplier of the load term")
    beta: Multiplier = option(1.0, "multiplier of the communication term")
    gamma: Multiplier = option(1.0, "multiplier of the migration term")
    gate: Multiplier = option(1.0, "commit when the gain exceeds this many stalls; 0: any gain")
    backend: str = option(
        "auto", "all2all: bytes depend on placement; allgather_reducescatter: they do not"
    )
    replicas: str = option("near", "near: nearest replica first within balance; even: vLLM's hash")
    profile: str = option(
        "", "cost profile, by name or file; empty: the machine's packaged one, scaled to the model"
    )
    half_life_steps: Positive = option(1000.0, "recorded steps lose half their weight in so many")
    records: str = option("", "directory for one record per rearrangement; empty: none")


@dataclass(frozen=True, slots=True)
class FeedbackConfig:
    """Level `feedback`: expert pressure into dispatch, dispatch's source mix into placement."""

    weight: NotNegative = option(1.0, "multiplier of expert pressure in the dispatch cost")


@dataclass(frozen=True, slots=True)
class GimbalConfig:
    """The whole configuration; the defaults are the product."""

    # pydantic reads this to refuse unknown keys here and in every nested section.
    __pydantic_config__ = ConfigDict(extra="forbid")

    enabled: bool = option(True, "false leaves vLLM exactly as it is")
    levels: tuple[str, ...] = option(LEVELS, "levels that are switched on")
    board_port: Port = option(
        0, "TCP port for snapshots of engines on other hosts; 0: vLLM's data-parallel RPC port + 1"
    )
    publish_to: str = option(
        "",
        "subscribers of every engine's snapshots: tcp://HOST:PORT is called, @tcp://HOST:PORT is "
        "listened on at PORT + rank; several with commas; empty: nobody",
    )
    publish_name: str = option(
        "", "this server's name in what it publishes; empty: the host's and the start's"
    )
    publish_secret_file: str = option(
        "", "file with the secret that signs it; empty: GIMBAL_PUBLISH_SECRET, or unsigned"
    )
    admin: bool = option(False, "POST /gimbal/control may switch policies on the running server")
    get_load: bool = option(
        False, "GET /get_load answers how busy the server is, for a router that asks"
    )
    step_records: str = option("", "directory for one record per engine step; empty: none")
    trace_records: str = option(
        "", "directory for a trace of the requests served, without their texts; empty: none"
    )
    trace_records_mb: PositiveCount = option(256, "size at which an API server's trace ends")
    dispatch: DispatchConfig = DispatchConfig()
    queue: QueueConfig = QueueConfig()
    placement: PlacementConfig = PlacementConfig()
    feedback: FeedbackConfig = FeedbackConfig()


for _section in (DispatchConfig, QueueConfig, PlacementConfig, FeedbackConfig):
    setattr(_section, "__pydantic_config__", ConfigDict(extra="forbid"))  # noqa: B010

_ADAPTER = TypeAdapter(GimbalConfig)

NAMED: tuple[tuple[str, str, Registry[Any]], ...] = (
    ("dispatch", "policy", POLICIES),
    ("queue", "ordering", ORDERINGS),
    ("placement", "placer", PLACERS),
)
"""Section, its key that names a policy, and what resolves the name."""

MOVED = {
    ("dispatch", "session_patience"): "gimbal",
    ("dispatch", "expected_output_tokens"): "gimbal",
    ("queue", "overtake_factor"): "gimbal",
    ("queue", "backlog_factor"): "gimbal",
}
"""Keys of before 0.2 that are now options of a policy, which is the value. Read until 0.3."""
_BUDGET = "; queue.step_budget and queue.slo_* are there instead"
GONE = {
    ("", "seed"): "",
    ("queue", "protect_decodes"): _BUDGET,
    ("queue", "tpot_factor"): _BUDGET,
    ("queue", "patience_steps"): _BUDGET,
    ("queue", "interval_backlog_steps"): _BUDGET,
}
"""Keys of before 0.2 that say nothing any more, and what does. Read, and ignored, until 0.3."""


def _keys_at(path: tuple[str, ...]) -> list[str]:
    """Valid keys of the section that `path` (of an unknown key) points into."""
    section: Any = GimbalConfig
    for part in path[:-1]:
        types = {f.name: f.default for f in dataclasses.fields(section)}
        section = type(types[part])
    return [f.name for f in dataclasses.fields(section)]


def parse_config(values: Mapping[str, Any], where: str = "configuration") -> GimbalConfig:
    """Validates `values`; raises InputError naming `where`, the key and the nearest valid key."""
    try:
        config = _ADAPTER.validate_python(modernized(values, where))
    except ValidationError as error:
        found = complaint(error)
        if found.unknown:
            hint = nearest(found.path[-1], _keys_at(found.path))
            raise InputError(f"{where}: unknown key {found.key!r}{hint}") from None
        raise InputError(f"{where}: {found.key or '(top level)'}: {found.text}") from None
    for level in config.levels:
        if level not in LEVELS:
            raise InputError(f"{where}: levels: unknown level {level!r}{nearest(level, LEVELS)}")
    for section, key, registry in NAMED:
        chosen = getattr(config, section)
        registry.check(getattr(chosen, key), chosen.options, where, f"{section}.{key}")
    _check_placement(config.placement, where)
    check_name(config.publish_name, f"{where}: publish_name")
    if parse_endpoints(config.publish_to, f"{where}: publish_to"):
        try:
            read_secret(config.publish_secret_file)
        except InputError as error:
            raise InputError(f"{where}: publish_secret_file: {error}") from None
    return config


def _check_placement(placement: PlacementConfig, where: str) -> None:
    """Values of section `placement` that a type does not tell."""
    for key, value, choices in (
        ("backend", placement.backend, ("auto", *BACKENDS)),
        ("replicas", placement.replicas, REPLICA_CHOICES),
    ):
        if value not in choices:
            hint = nearest(value, choices)
            raise InputError(f"{where}: placement.{key}: unknown {value!r}{hint}")
    if placement.profile:
        from gimbal.core.cost.profile import load_profile

        try:
            load_profile(placement.profile)
        except InputError as error:
            raise InputError(f"{where}: placement.profile: {error}") from None


def checked(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`values` with today's keys; raises as `parse_config`."""
    new = modernized(values, where)
    parse_config(new, where)
    return new


def modernized(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`values` with keys of an older version at their new place, each with a warning."""
    new = dict(values)
    for (section, key), instead in GONE.items():
        place = new.get(section) if section else new
        if isinstance(place, Mapping) and key in place:
            left = {k: v for k, v in place.items() if k != key}
            new = {**new, section: left} if section else left
            name = f"{section}.{key}" if section else key
            logger.warning(
                "Gimbal: %s: %s says nothing any more; remove it%s", where, name, instead
            )
    for section, key, registry in NAMED:
        old = new.get(section)
        if not isinstance(old, Mapping):
            continue
        moved = {k: v for k, v in old.items() if (section, k) in MOVED}
        if not moved:
            continue
        rest: dict[str, Any] = {k: v for k, v in old.items() if k not in moved}
        name = rest.get(key, "gimbal")
        for option_name, value in moved.items():
            owner = MOVED[section, option_name]
            given = rest.get("options") or {}
            if name == owner and isinstance(given, Mapping):  # else it is refused below
                rest["options"] = {option_name: value, **given}
            logger.warning(
                "Gimbal: %s: %s.%s is now %s.options.%s of %s %r%s",
                where, section, option_name, section, option_name, registry.kind, owner,
                "" if name == owner else f" and says nothing to {name!r}",
            )  # fmt: skip
        new[section] = rest
    return new
