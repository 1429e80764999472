"""A cost-model profile: the constants of one model on one machine, each with where it came from.

A profile is a YAML file (packaged ones live in ``gimbal/core/cost/profiles``). Every term is
``max(floor_us, base_us + per_unit_us * x)`` in microseconds; what ``x`` counts is in the field's
name. `StepModel` in ``step.py`` adds them up; nothing else interprets them.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from gimbal.core.errors import InputError
from gimbal.core.named_yaml import packaged_names, read_named_yaml
from gimbal.core.numbers import MOST_EXPERTS, MOST_LAYERS
from gimbal.core.options import (
    Count,
    NotNegative,
    PositiveCount,
    Ranks,
    RealNumber,
    WholeNumber,
    complaint,
)

_STRICT = ConfigDict(extra="forbid")

# Bounds that no machine comes near and within which no sum, product or power overflows.
MOST_US = 1e9
Time = Annotated[RealNumber, Field(ge=0.0, le=MOST_US)]
Offset = Annotated[RealNumber, Field(ge=-MOST_US, le=MOST_US)]
Rate = Annotated[RealNumber, Field(gt=0.0, le=MOST_US)]
Norm = Annotated[RealNumber, Field(ge=1.0, le=8.0)]
Layers = Annotated[WholeNumber, Field(ge=1, le=MOST_LAYERS)]
Experts = Annotated[WholeNumber, Field(ge=1, le=MOST_EXPERTS)]


@dataclass(frozen=True, slots=True)
class Term:
    """``max(floor_us, base_us + per_unit_us * x)``.

    Attributes:
        source: where the numbers come from (table and version, paper, data sheet, fit).
        error: mean absolute relative error on rows held out of the fit, or None when unknown.
    """

    per_unit_us: Time = 0.0
    base_us: Offset = 0.0
    floor_us: Time = 0.0
    source: str = "estimate"
    error: NotNegative | None = None

    def at(self, x: float) -> float:
        """Microseconds at `x` units."""
        return max(self.floor_us, self.base_us + self.per_unit_us * x)


@dataclass(frozen=True, slots=True)
class AttentionTerm:
    """One layer's attention on one rank, decode and prefill in one varlen kernel.

    ``max(floor, base + kv * KV + pair * sum n*(p + n/2) + prefix * sum p)`` with KV the tokens
    read by decodes, n the new and p the already computed tokens of a prefill chunk. A decode that
    shares its kernel with prefill loses the packed decode path, so KV has a second, mixed rate.
    """

    floor_us: Time = 0.0
    base_us: Offset = 0.0
    per_decode_kv_token_us: Time = 0.0
    per_mixed_decode_kv_token_us: Time = 0.0
    per_prefill_pair_us: Time = 0.0
    per_prefill_kv_token_us: Time = 0.0
    source: str = "estimate"
    error: NotNegative | None = None


@dataclass(frozen=True, slots=True)
class MoeTerm:
    """Fused experts of one layer on one EP rank.

    ``base + ((active*A)^p + (pair*P)^p)^(1/p) + token*G``: A distinct experts hit and P
    token-expert pairs on the rank, G tokens of the whole EP group (align and sum over all rows).
    Decode is bound by A (weights are read once per expert), prefill by P.
    """

    base_us: Offset
    per_active_expert_us: Time
    per_pair_us: Time
    per_group_token_us: Time
    norm: Norm
    source: str = "estimate"
    error: NotNegative | None = None


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What the model fixes."""

    layers: Layers
    experts: Experts
    top_k: Experts
    hidden: PositiveCount
    expert_bytes: PositiveCount
    kv_bytes_per_token: Count


@dataclass(frozen=True, slots=True)
class Layout:
    """How the profile's model is spread: EP ranks = dp * tp."""

    dp: Ranks
    tp: Ranks = 1

    @property
    def ep(self) -> int:
        return self.dp * self.tp


@dataclass(frozen=True, slots=True)
class Interconnect:
    """Bytes per microsecond by tier (1 GB/s = 1,000 bytes/us), for routed all-to-all."""

    same_node_bytes_per_us: Rate
    other_node_bytes_per_us: Rate
    migration_bytes_per_us: Rate
    migration_layer_us: Time
    source: str = "estimate"


@dataclass(frozen=True, slots=True)
class Profile:
    """Constants of one model on one machine in one layout.

    Attributes:
        per_rank_token: per layer, x = tokens of the busiest DP rank (norms, QKV, O, router).
        per_group_token: per layer, x = tokens of all DP ranks (dispatch and combine).
        attention, moe: per layer, see their classes.
        per_step: once per step, x = requests that sample (LM head, sampler).
        host_us, host_per_request_us: scheduler and input preparation that the device waits for;
            per request that samples on the busiest rank.
        host_per_group_request_us: per request that samples, over all ranks: a front end that has
            no core of its own.
        host_prefill_us: once per step in which any rank prefills.
        launch_layer_us: kernel launches of one layer without CUDA graphs; the step lasts at least
            layers * launch_layer_us when its tokens exceed `graph_tokens`.
        graph_tokens: largest step that a CUDA graph covers (0: eager throughout).
        api_us, api_token_us: front end, per request before it is dispatched and per token
            streamed after it was sampled.
        kv_tokens: KV pool of one DP engine in tokens.
        estimated: True when derived from data sheets and not measured.
    """

    name: str
    machine: str
    model: ModelShape
    layout: Layout
    per_rank_token: tuple[Term, ...]
    per_group_token: tuple[Term, ...]
    attention: AttentionTerm
    moe: MoeTerm
    per_step: tuple[Term, ...]
    interconnect: Interconnect
    host_us: Time = 0.0
    host_per_request_us: Time = 0.0
    host_per_group_request_us: Time = 0.0
    host_prefill_us: Time = 0.0
    launch_layer_us: Time = 0.0
    graph_tokens: Count = 0
    api_us: Time = 0.0
    api_token_us: Time = 0.0
    kv_tokens: Count = 0
    backend: str = "allgather_reducescatter"
    estimated: bool = False
    notes: tuple[str, ...] = field(default=())


for _type in (Term, AttentionTerm, MoeTerm, ModelShape, Layout, Interconnect, Profile):
    setattr(_type, "__pydantic_config__", _STRICT)  # noqa: B010

_ADAPTER = TypeAdapter(Profile)
_PACKAGED = ("gimbal.core.cost", "profiles")


def profile_names() -> list[str]:
    """Names of the packaged profiles."""
    return packaged_names(*_PACKAGED)


def load_profile(name_or_path: str | Path) -> Profile:
    """A packaged profile by name, or a YAML file; raises InputError saying which key is wrong."""
    values = read_named_yaml("profile", *_PACKAGED, name_or_path)
    return parse_profile(values, str(name_or_path))


def parse_profile(values: Any, where: str) -> Profile:
    """Validates a mapping; raises InputError with the dotted key."""
    if not isinstance(values, dict):
        raise InputError(f"profile {where}: expected a mapping of terms")
    try:
        return _ADAPTER.validate_python(values)
    except ValidationError as error:
        found = complaint(error)
        raise InputError(f"profile {where}: {found.key}: {found.text}") from None


def slowed(profile: Profile, factor: float) -> Profile:
    """The same machine running `factor` times as slow: every time grows, every rate shrinks."""
    slower: Profile = _slowed(profile, factor)
    return slower


def _slowed(value: Any, factor: float) -> Any:
    if isinstance(value, tuple):
        return tuple(_slowed(item, factor) for item in value)
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    changed = {}
    for spec in dataclasses.fields(value):
        own = getattr(value, spec.name)
        if spec.name.endswith("_per_us"):
            changed[spec.name] = own / factor
        elif spec.name.endswith("_us"):
            changed[spec.name] = own * factor
        else:
            changed[spec.name] = _slowed(own, factor)
    return dataclasses.replace(value, **changed)


def dump_profile(profile: Profile) -> str:
    """YAML text that `load_profile` reads back to an equal profile."""
    return yaml.safe_dump(_plain(profile), sort_keys=False, width=100)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value
