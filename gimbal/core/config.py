"""Gimbal's configuration: one schema for the YAML file, the flags and ``additional_config``.

Each level has one frozen dataclass; ``help`` metadata is what ``gimbal config`` prints. Unknown
keys are refused with the nearest valid one, wrong types with the key's full path.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from gimbal.core.dispatch import POLICIES
from gimbal.core.errors import InputError, nearest
from gimbal.core.queue import ORDERINGS

LEVELS = ("dispatch", "queue", "placement", "feedback")

NotNegative = Annotated[float, Field(ge=0.0)]
Positive = Annotated[float, Field(gt=0.0)]
AtLeastOne = Annotated[float, Field(ge=1.0)]
Count = Annotated[int, Field(ge=0)]
Port = Annotated[int, Field(ge=0, le=65535)]


def option(default: Any, help: str) -> Any:
    """A dataclass field with its help text; mutable defaults are not allowed."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, slots=True)
class DispatchConfig:
    """Level `dispatch`: which engine a request goes to."""

    policy: str = option("gimbal", f"dispatch policy: {', '.join(POLICIES)}")
    max_signal_age_ms: Positive = option(2000.0, "older snapshots are not trusted")
    prefix_chunks: Count = option(1_000_000, "prompt chunks held in the prefix index")
    prefix_chunk_tokens: Annotated[int, Field(ge=1)] = option(
        64, "tokens per chunk; shorter shared prefixes are not seen"
    )
    sessions: Count = option(65_536, "conversations whose engine is remembered")
    session_patience: NotNegative = option(
        1.0, "keep a conversation while it costs at most this many re-prefills of its unknown part"
    )
    expected_output_tokens: NotNegative = option(
        57.0, "output length assumed in pricing decode load (BurstGPT's mean)"
    )


@dataclass(frozen=True, slots=True)
class QueueConfig:
    """Level `queue`: the order of an engine's waiting requests and prefill budget."""

    ordering: str = option("gimbal", f"order of the waiting queue: {', '.join(ORDERINGS)}")
    overtake_factor: AtLeastOne = option(
        10.0, "later work that may overtake a request, in multiples of its own (gimbal)"
    )
    backlog_factor: NotNegative = option(
        4.0, "drain times of the queue that a prompt of mean size counts as younger (gimbal)"
    )
    max_wait_s: NotNegative = option(
        60.0, "who waited longer goes first, oldest first (gimbal); 0 never"
    )
    priority_tokens: NotNegative = option(
        0.0, "prompt tokens one priority level is worth; 0 keeps classes strictly apart"
    )
    in_batch: bool = option(True, "share each step's prefill budget by the same order (gimbal)")
    pass_steps: Count = option(32, "steps a request without KV blocks may be passed; 0 never")
    pass_s: NotNegative = option(1.0, "seconds a request without KV blocks may be passed")
    interval_backlog_steps: NotNegative = option(
        0.0,
        "keep vLLM's --prefill-schedule-interval until an engine has this many full steps of "
        "prefill to do; 0: vLLM's rule, until anybody waits (gimbal)",
    )
    graph_steps: NotNegative = option(
        2.0,
        "prefill a backlog that fits into this many steps in steps that replay CUDA graphs, where "
        "measured steps say that it pays; 0 never (gimbal)",
    )
    protect_decodes: bool = option(False, "bound the prefill that rides along with decodes")
    tpot_factor: AtLeastOne = option(
        2.5, "how much longer than a decode-only step one with prefill may be (protect_decodes)"
    )
    patience_steps: Positive = option(
        8.0, "steps in which a backlog is to be prefilled whatever that takes (protect_decodes)"
    )


@dataclass(frozen=True, slots=True)
class PlacementConfig:
    """Level `placement`: where experts live."""

    placer: str = option("gimbal", "placement algorithm by name")
    alpha: float = option(1.0, "multiplier of the load term")
    beta: float = option(1.0, "multiplier of the communication term")
    gamma: float = option(1.0, "multiplier of the migration term")
    gate: float = option(1.0, "commit when the gain exceeds this many stalls; 0: any gain")
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
    seed: int = option(0, "seed of every random choice")
    board_port: Port = option(
        0, "TCP port for snapshots of engines on other hosts; 0: vLLM's data-parallel RPC port + 1"
    )
    admin: bool = option(False, "POST /gimbal/control may switch policies on the running server")
    step_records: str = option("", "directory for one record per engine step; empty: none")
    dispatch: DispatchConfig = DispatchConfig()
    queue: QueueConfig = QueueConfig()
    placement: PlacementConfig = PlacementConfig()
    feedback: FeedbackConfig = FeedbackConfig()


for _section in (DispatchConfig, QueueConfig, PlacementConfig, FeedbackConfig):
    setattr(_section, "__pydantic_config__", ConfigDict(extra="forbid"))  # noqa: B010

_ADAPTER = TypeAdapter(GimbalConfig)


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
        config = _ADAPTER.validate_python(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        path = tuple(str(part) for part in first["loc"])
        dotted = ".".join(path) or "(top level)"
        if first["type"] == "unexpected_keyword_argument":
            hint = nearest(path[-1], _keys_at(path))
            raise InputError(f"{where}: unknown key {dotted!r}{hint}") from None
        got = first.get("input")
        raise InputError(f"{where}: {dotted}: {first['msg'].lower()}, got {got!r}") from None
    for level in config.levels:
        if level not in LEVELS:
            raise InputError(f"{where}: levels: unknown level {level!r}{nearest(level, LEVELS)}")
    for key, name, known in (
        ("dispatch.policy", config.dispatch.policy, POLICIES),
        ("queue.ordering", config.queue.ordering, ORDERINGS),
    ):
        if name not in known:
            raise InputError(f"{where}: {key}: unknown {name!r}{nearest(name, known)}")
    return config
