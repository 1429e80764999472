"""Scenarios: named descriptions of what people send, from published statistics, in YAML.

`generate.generate` makes a trace of one. The packaged ones lie in ``scenarios/``, every figure
beside its source; ``docs/workloads.md`` lists the keys.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError

from gimbal.core.errors import InputError, nearest
from gimbal.core.named_yaml import packaged_names, read_named_yaml
from gimbal.core.options import Positive, RealNumber, WholeNumber, complaint
from gimbal.workloads.arrivals import LEAST_CV, LEAST_RPS, MOST_CV

DEFAULT_SCENARIO = "burst"
MOST_POINTS = 64
"""Percentiles of one table."""
MOST_CONTEXT = 2**22
"""Tokens of a prompt, seconds of a gap."""

Percentile = Annotated[RealNumber, Field(ge=0.0, le=100.0)]


def _ascending(table: dict[float, float]) -> dict[float, float]:
    points = sorted(table)
    if not points or points[0] != 0.0 or points[-1] != 100.0 or len(points) > MOST_POINTS:
        raise ValueError(f"expected percentiles from 0 to 100, at most {MOST_POINTS} of them")
    values = [table[point] for point in points]
    if values != sorted(values):
        raise ValueError("expected values that never fall")
    return dict(zip(points, values, strict=True))


_Size = Annotated[RealNumber, Field(gt=0.0, le=MOST_CONTEXT)]
Table = Annotated[dict[Percentile, _Size], AfterValidator(_ascending)]
"""Percentile -> value; between two of them the logarithm runs straight."""
_Few = Annotated[RealNumber, Field(gt=0.0, le=100)]
_Many = Annotated[RealNumber, Field(gt=0.0, le=10_000)]
Tokens = Annotated[WholeNumber, Field(ge=1, le=MOST_CONTEXT)]
Share = Annotated[RealNumber, Field(ge=0.0, le=1.0)]
Cv = Annotated[RealNumber, Field(ge=LEAST_CV, le=MOST_CV)]


def draw(
    table: dict[float, float], count: int, rng: np.random.Generator
) -> npt.NDArray[np.float64]:
    """[count] values that have the percentiles of `table`."""
    logs = np.log(list(table.values()))
    values: npt.NDArray[np.float64] = np.exp(np.interp(100 * rng.random(count), list(table), logs))
    return values


def draw_whole(
    table: dict[float, float], count: int, rng: np.random.Generator
) -> npt.NDArray[np.int64]:
    """[count] values as of `draw`, whole and at least 1."""
    values: npt.NDArray[np.int64] = np.rint(draw(table, count, rng)).astype(np.int64)
    return np.maximum(1, values)


@dataclass(frozen=True, slots=True)
class Arrivals:
    """How sessions begin.

    Attributes:
        cv: coefficient of variation of the gaps, which are gamma; 1 is Poisson.
        swing_cv, swing_s: the rate of each stretch of `swing_s` seconds is drawn with this
            coefficient of variation; 0 keeps it.
    """

    cv: Cv = 1.0
    swing_cv: Annotated[RealNumber, Field(ge=0.0, le=10.0)] = 0.0
    swing_s: Annotated[RealNumber, Field(ge=0.01, le=MOST_CONTEXT)] = 60.0

    __pydantic_config__ = ConfigDict(extra="forbid")


@dataclass(frozen=True, slots=True)
class Shared:
    """What the prompts of all sessions begin with: system prompts, tools.

    Attributes:
        tokens: of each, within the first prompt's; whole blocks of them are shared.
        shares: how often each is used, relative to the others.
    """

    tokens: Tokens
    shares: tuple[Positive, ...] = (1.0,)

    __pydantic_config__ = ConfigDict(extra="forbid")


@dataclass(frozen=True, slots=True)
class Turns:
    """Turns of a session after its first.

    Attributes:
        count: turns of a session.
        new_tokens: of a turn's prompt that no earlier prompt or answer holds.
        gap_s: seconds from an answer to the next prompt.
        pause_s: instead of `gap_s` after a share of `pauses` of the answers.
        s_per_token: seconds that a token of an answer takes; 0 has `gap_s` run from prompt to
            prompt. Arrivals do not wait for the answers of the server under test.
        history: a prompt contains the earlier prompts and answers, not just the first one's text.
        most_tokens: of a prompt; what would be longer begins anew with `compacted_tokens`.
    """

    count: Annotated[dict[Percentile, _Many], AfterValidator(_ascending)]
    new_tokens: Table
    gap_s: Table
    pause_s: Table | None = None
    pauses: Share = 0.0
    s_per_token: Annotated[RealNumber, Field(ge=0.0, le=3600.0)] = 0.0
    history: bool = True
    most_tokens: Tokens = MOST_CONTEXT
    compacted_tokens: Tokens = 1

    __pydantic_config__ = ConfigDict(extra="forbid")


@dataclass(frozen=True, slots=True)
class Helpers:
    """Sub-agents: sessions that a turn begins beside each other, and waits for.

    Attributes:
        share: of turns that begin any.
        count: of those that one turn begins.
        turns: of each.
        prompt_tokens: of each one's first prompt, the shared part included.
    """

    share: Annotated[RealNumber, Field(ge=0.0, le=0.1)]
    count: Annotated[dict[Percentile, _Few], AfterValidator(_ascending)]
    turns: Annotated[dict[Percentile, _Few], AfterValidator(_ascending)]
    prompt_tokens: Table

    __pydantic_config__ = ConfigDict(extra="forbid")


@dataclass(frozen=True, slots=True)
class Scenario:
    """What people send.

    Attributes:
        description: a line for lists.
        sources: where the figures come from.
        rate_rps: requests per second where a run does not say.
        requests: of a run that does not say.
        prompt_tokens: of a session's first prompt.
        output_tokens: of every answer.
        block_tokens: of a prefix block, at least 16; 0 shares nothing.
    """

    name: str
    description: str
    sources: tuple[str, ...]
    rate_rps: Annotated[RealNumber, Field(ge=LEAST_RPS, le=1e6)]
    prompt_tokens: Table
    output_tokens: Table
    requests: Annotated[WholeNumber, Field(ge=1, le=100_000)] = 2000
    arrivals: Arrivals = field(default_factory=Arrivals)
    block_tokens: Literal[0] | Annotated[WholeNumber, Field(ge=16, le=65536)] = 0
    shared: Shared | None = None
    turns: Turns | None = None
    helpers: Helpers | None = None

    __pydantic_config__ = ConfigDict(extra="forbid")

    def __post_init__(self) -> None:
        if self.block_tokens == 0 and (self.shared or self.turns):
            raise ValueError("block_tokens: expected >= 16 beside shared or turns")
        if self.helpers is not None and (self.turns is None or not self.turns.history):
            raise ValueError("helpers: expected turns, with history")
        if self.turns is not None and self.turns.compacted_tokens > self.turns.most_tokens:
            raise ValueError("turns: expected compacted_tokens <= most_tokens")


_ADAPTER = TypeAdapter(Scenario)
_PACKAGED = ("gimbal.workloads", "scenarios")


def scenario_names() -> list[str]:
    """Names of the packaged scenarios."""
    return packaged_names(*_PACKAGED)


def load_scenario(name_or_path: str | Path) -> Scenario:
    """A packaged scenario by name, or a YAML file; raises InputError."""
    values: Any = read_named_yaml("scenario", *_PACKAGED, name_or_path)
    if not isinstance(values, dict):
        raise InputError(f"scenario {name_or_path}: expected a mapping")
    values.setdefault("name", Path(name_or_path).stem)
    try:
        return _ADAPTER.validate_python(values)
    except ValidationError as error:
        found = complaint(error)
        known = list(Scenario.__dataclass_fields__)
        hint = nearest(found.key, known) if found.unknown and len(found.path) == 1 else ""
        text = found.text.removeprefix("value error, ")
        if not found.path:  # the whole of it says nothing
            raise InputError(f"scenario {name_or_path}: {text.split(', got ')[0]}") from None
        raise InputError(f"scenario {name_or_path}: {found.key}: {text}{hint}") from None
