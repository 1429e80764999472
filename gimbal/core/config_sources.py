"""Where configuration comes from, and how it is shown.

Precedence, lowest first: the defaults, the YAML file (``--gimbal-config``), vLLM's
``--additional-config '{"gimbal": ...}'``, the flags. All are one schema (`core.config`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from gimbal.core.config import LEVELS, GimbalConfig, parse_config
from gimbal.core.errors import InputError


def read_config_file(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; a top-level ``gimbal:`` key may wrap it.

    Raises InputError naming the file, and the line where YAML itself does not parse.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark is not None else ""
        raise InputError(
            f"{path}{line}: not YAML ({getattr(error, 'problem', None) or error})"
        ) from None
    if values is None:
        return {}
    if isinstance(values, dict) and set(values) == {"gimbal"}:
        values = values["gimbal"] or {}
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected a mapping of options, got {type(values).__name__}")
    return values


def parse_levels(text: str) -> list[str]:
    """``"dispatch,queue"`` -> its names; ``all`` and ``none`` are shorthands.

    Names are checked by `parse_config` like every other value.
    """
    if text == "all":
        return list(LEVELS)
    if text == "none":
        return []
    return [part.strip() for part in text.split(",") if part.strip()]


def merge_config(sources: Iterable[tuple[str, Mapping[str, Any]]]) -> GimbalConfig:
    """Later sources win, key by key; each (where, values) is checked on its own first.

    Raises InputError naming the source that holds the bad key or value.
    """
    merged: dict[str, Any] = {}
    for where, values in sources:
        parse_config(values, where)
        merged = _overlay(merged, values)
    return parse_config(merged)


def _overlay(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(below)
    for key, value in above.items():
        old = result.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        result[key] = _overlay(old, value) if both else value  # type: ignore[arg-type]
    return result


def to_mapping(config: GimbalConfig) -> dict[str, Any]:
    """`config` as plain JSON values, every default included."""
    values: dict[str, Any] = _plain(dataclasses.asdict(config))
    return values


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value


def to_yaml(config: GimbalConfig) -> str:
    """`config` as YAML with each option's description above it; reading it back gives `config`."""
    return "\n".join(_section(config, "")) + "\n"


def _section(section: Any, indent: str) -> list[str]:
    lines: list[str] = []
    for item in dataclasses.fields(section):
        value = getattr(section, item.name)
        if dataclasses.is_dataclass(value):
            summary = (type(value).__doc__ or "").strip().splitlines()[0]
            lines += ["", f"{indent}# {summary}", f"{indent}{item.name}:"]
            lines += _section(value, indent + "  ")
            continue
        default = item.default
        text = item.metadata.get("help", "")
        changed = "" if value == default else f" (default {_scalar(default)})"
        lines.append(f"{indent}# {text}{changed}")
        lines.append(f"{indent}{item.name}: {_scalar(value)}")
    return lines


def _scalar(value: Any) -> str:
    """One-line YAML of a plain value."""
    text: str = yaml.safe_dump(_plain(value), default_flow_style=True, width=1000)
    return text.removesuffix("...\n").strip()
