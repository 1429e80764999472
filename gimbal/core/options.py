"""Options as frozen dataclasses: fields with a help text, types that say their range.

A policy brings its own: a class attribute ``Options``, one frozen dataclass, given to the
constructor as its one argument (see docs/writing-a-policy.md). The configuration's sections are
made of the same parts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import field
from functools import lru_cache
from typing import Annotated, Any, NamedTuple

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError
from pydantic_core import PydanticCustomError

from gimbal.core.errors import InputError, nearest, one_line
from gimbal.core.numbers import MOST, MOST_COUNT, MOST_MULTIPLIER, MOST_RANKS, shown


def _no_truth(value: Any) -> Any:
    if isinstance(value, bool):  # which pydantic takes for 0 or 1
        raise PydanticCustomError("number", "expected a number")
    return value


RealNumber = Annotated[float, BeforeValidator(_no_truth), Field(allow_inf_nan=False)]
WholeNumber = Annotated[int, BeforeValidator(_no_truth)]
NotNegative = Annotated[RealNumber, Field(ge=0.0, le=MOST)]
Positive = Annotated[RealNumber, Field(gt=0.0, le=MOST)]
AtLeastOne = Annotated[RealNumber, Field(ge=1.0, le=MOST)]
Finite = Annotated[RealNumber, Field(ge=-MOST, le=MOST)]
Multiplier = Annotated[RealNumber, Field(ge=0.0, le=MOST_MULTIPLIER)]
Count = Annotated[WholeNumber, Field(ge=0, le=MOST_COUNT)]
PositiveCount = Annotated[WholeNumber, Field(ge=1, le=MOST_COUNT)]
Ranks = Annotated[WholeNumber, Field(ge=1, le=MOST_RANKS)]
Port = Annotated[WholeNumber, Field(ge=0, le=65535)]


def option(default: Any, help: str) -> Any:
    """A dataclass field with its help text; mutable defaults are not allowed."""
    return field(default=default, metadata={"help": help})


class Complaint(NamedTuple):
    """The first thing that a checked mapping has wrong.

    Attributes:
        path: keys from the outside in; empty where the mapping itself is wrong.
        text: what is wrong with the value, and what it is.
        unknown: nothing is known by that key.
    """

    path: tuple[str, ...]
    text: str
    unknown: bool

    @property
    def key(self) -> str:
        """The path, dotted."""
        return ".".join(self.path)


def complaint(error: ValidationError) -> Complaint:
    """What a user is told of `error`."""
    first = error.errors()[0]
    # What lacks a key is the whole mapping: it says nothing.
    got = "" if first["type"] == "missing" else f", got {shown(first.get('input'))}"
    return Complaint(
        tuple(map(str, first["loc"])),
        one_line(first["msg"].lower()) + got,
        first["type"] == "unexpected_keyword_argument",
    )


def parse_options(options: type, values: Mapping[str, Any], where: str) -> Any:
    """`options` (a dataclass) filled from `values`.

    Raises InputError that names `where`, the key and, for an unknown one, the nearest valid key.
    """
    known = [f.name for f in dataclasses.fields(options)]
    for key in values:
        if key not in known:
            hint = nearest(str(key), known) if known else " (it has no options)"
            raise InputError(f"{where}: unknown option {key!r}{hint}")
    try:
        return _adapter(options).validate_python(dict(values))
    except ValidationError as error:
        found = complaint(error)
        raise InputError(f"{where}.{found.key}: {found.text}") from None
    except ValueError as error:  # from the dataclass's own __post_init__
        raise InputError(f"{where}: {one_line(error)}") from None


@lru_cache(maxsize=64)
def _adapter(options: type) -> TypeAdapter[Any]:
    return TypeAdapter(options)
