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

from gimbal.core.config import LEVELS, NAMED, GimbalConfig, checked, parse_config
from gimbal.core.errors import InputError
from gimbal.core.yaml_reader import read_yaml


def read_config_file(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; a top-level ``gimbal:`` key may wrap it.

    Raises InputError naming the file, and the line where YAML itself does not parse.
    """
    values = read_yaml(path)
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
        merged = overlay(merged, checked(values, where))
    return parse_config(merged)


def overlay(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above` over `below`, key by key; another policy's options do not outlive the policy."""
    result = dict(below)
    for key, value in above.items():
        old = result.get(key)
        if not (isinstance(old, Mapping) and isinstance(value, Mapping)):
            result[key] = value
            continue
        for section, name, _ in NAMED:
            if key == section and name in value and value[name] != old.get(name, "gimbal"):
                old = {k: v for k, v in old.items() if k != "options"}
        result[key] = overlay(old, value)
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
    """`config` as YAML with each option's description above it; read back it means the same.

    The options of the policies that it names are all there, defaults included.
    """
    policies = {
        section: registry.options(getattr(chosen, key), chosen.options)
        for section, key, registry in NAMED
        for chosen in (getattr(config, section),)
    }
    return "\n".join(_section(config, "", policies)) + "\n"


def _section(section: Any, indent: str, policies: Mapping[str, Any] | None = None) -> list[str]:
    lines: list[str] = []
    for item in dataclasses.fields(section):
        value = getattr(section, item.name)
        if dataclasses.is_dataclass(value):
            summary = (type(value).__doc__ or "").strip().splitlines()[0]
            lines += ["", f"{indent}# {summary}", f"{indent}{item.name}:"]
            own = None if policies is None else policies.get(item.name)
            lines += _section(value, indent + "  ", {"options": own})
            continue
        if item.name == "options" and policies is not None and policies["options"] is not None:
            lines += [f"{indent}# {item.metadata['help']}", f"{indent}options:"]
            lines += _section(policies["options"], indent + "  ")
            continue
        default = {} if item.default is dataclasses.MISSING else item.default
        text = item.metadata.get("help", "")
        changed = "" if value == default else f" (default {_scalar(default)})"
        lines.append(f"{indent}# {text}{changed}")
        lines.append(f"{indent}{item.name}: {_scalar(value)}")
    return lines


def _scalar(value: Any) -> str:
    """One-line YAML of a plain value."""
    text: str = yaml.safe_dump(_plain(value), default_flow_style=True, width=1000)
    return text.removesuffix("...\n").strip()
