"""Arms from a YAML file, and the choice of those that a comparison runs."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gimbal.core.config import LEVELS, checked
from gimbal.core.config_sources import overlay, read_config_file
from gimbal.core.errors import InputError, nearest
from gimbal.core.options import parse_options
from gimbal.core.yaml_reader import read_yaml
from gimbal.report.arms import ARMS, SIGNALS, Arm, Simulated, get_arm

DEFAULT_ARMS = ("vllm", "gimbal")
_SHORTHANDS = {
    "policy": ("dispatch", "policy"),
    "policy_options": ("dispatch", "options"),
    "queue_ordering": ("queue", "ordering"),
    "placer": ("placement", "placer"),
}
"""Keys of an arm that stand for one of a section of its configuration."""
_KEYS = ("description", "levels", *_SHORTHANDS, "flags", "signals", "simulated", "config")


def select_arms(
    names: Sequence[str] | None = None,
    levels: Sequence[str] | None = None,
    file: Path | None = None,
    config_file: Path | None = None,
) -> list[Arm]:
    """The arms called `names`, in that order, each with a configuration that Gimbal accepts.

    Args:
        names: None takes `vllm` and the arms of `file`, or `DEFAULT_ARMS` without a file.
        levels: those of the arm ``gimbal``.
        file: see `read_arms`; an arm in it replaces a built-in one of its name.
        config_file: configuration under every arm's own; the arm ``gimbal`` is this file.

    Raises InputError for an unknown or repeated name, a malformed file or a bad configuration.
    """
    own = {} if file is None else read_arms(file)
    known = known_arms(own, levels, config_file)
    if names is None:
        names = DEFAULT_ARMS if file is None else list(dict.fromkeys(("vllm", *own)))
    chosen: dict[str, Arm] = {}
    for name in names:
        if name in chosen:
            raise InputError(f"--arms: {name!r} is named twice")
        try:
            chosen[name] = get_arm(name, known)
        except InputError as error:
            raise InputError(f"--arms: {error}") from None
        if not chosen[name].gimbal_config().enabled:
            raise InputError(f"arm {name}: enabled: false is no arm; levels: [] leaves it to vLLM")
    if not chosen:
        raise InputError("--arms: no arm named")
    return list(chosen.values())


def known_arms(
    own: Mapping[str, Arm],
    levels: Sequence[str] | None = None,
    config_file: Path | None = None,
) -> dict[str, Arm]:
    """Built-in arms and `own`, over the configuration of `config_file`; see `select_arms`."""
    known = ARMS | dict(own)
    if config_file is not None:
        base = checked(read_config_file(config_file), str(config_file))
        known = {n: replace(arm, config=overlay(base, arm.config)) for n, arm in known.items()}
    if levels is not None:
        for level in levels:
            if level not in LEVELS:
                raise InputError(f"--levels: unknown level {level!r}{nearest(level, LEVELS)}")
        arm = known["gimbal"]
        known["gimbal"] = replace(arm, config={**arm.config, "levels": list(levels)})
    return known


def read_arms(file: Path) -> dict[str, Arm]:
    """Arms of a YAML file, a mapping of their names; see `parse_arm`.

    Raises InputError naming the file, the arm and the key.
    """
    document = read_yaml(file, f"--arms-file {file}")
    if not isinstance(document, dict):
        raise InputError(f"--arms-file {file}: expected a mapping of arm names")
    return {
        str(name): parse_arm(f"--arms-file {file}: {name}", str(name), values)
        for name, values in document.items()
    }


def parse_arm(where: str, name: str, values: Any) -> Arm:
    """One arm from plain values; null counts as absent.

    Keys: `description`; `levels` (without: none), `policy`, `policy_options`, `queue_ordering` and
    `placer`, short for keys of `config`; `flags`, a list or one text; `signals`; `simulated`, the
    fields of `Simulated`; `config`, as in Gimbal's YAML file. Raises InputError that begins with
    `where`.
    """
    if not isinstance(values, Mapping):
        raise InputError(f"{where}: expected a mapping")
    for key in values:
        if key not in _KEYS:
            raise InputError(f"{where}: unknown key {key!r}{nearest(str(key), _KEYS)}")
    given = {key: value for key, value in values.items() if value is not None}
    signals = given.get("signals", "board")
    if signals not in SIGNALS:
        raise InputError(f"{where}: signals: expected {' or '.join(SIGNALS)}, got {signals!r}")
    return Arm(
        name,
        str(given.get("description", "")),
        _config(where, given),
        _flags(where, given.get("flags", [])),
        signals,
        _simulated(where, given["simulated"]) if "simulated" in given else None,
    )


def _simulated(where: str, values: Any) -> Simulated:
    if not isinstance(values, Mapping):
        raise InputError(f"{where}: simulated: expected a mapping")
    parsed: Simulated = parse_options(Simulated, values, f"{where}: simulated")
    return parsed


def _flags(where: str, flags: Any) -> tuple[str, ...]:
    if isinstance(flags, str):
        try:
            return tuple(shlex.split(flags))
        except ValueError as error:
            raise InputError(f"{where}: flags: {error}") from None
    if not isinstance(flags, list):
        raise InputError(f"{where}: flags: expected a list or one text, got {flags!r}")
    return tuple(str(word) for word in flags)


def _config(where: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with the shorthands in it, checked, its keys today's."""
    config = given.get("config", {})
    if not isinstance(config, Mapping):
        raise InputError(f"{where}: config: expected a mapping")
    config = dict(config)
    if "levels" in given:
        _put(where, config, "levels", given["levels"], "levels", "config.levels")
    levels = config.setdefault("levels", [])
    if not isinstance(levels, list) or not all(level in LEVELS for level in levels):
        raise InputError(f"{where}: levels: expected a list of {', '.join(LEVELS)}")
    for key, (section, inner) in _SHORTHANDS.items():
        if key not in given:
            continue
        if not isinstance(config.get(section, {}), Mapping):
            raise InputError(f"{where}: config.{section}: expected a mapping")
        config[section] = dict(config.get(section, {}))
        _put(where, config[section], inner, given[key], key, f"config.{section}.{inner}")
    return checked(config, where)


def _put(where: str, target: dict[str, Any], key: str, value: Any, short: str, dotted: str) -> None:
    if target.get(key, value) != value:
        raise InputError(f"{where}: {short} and {dotted} say different things: give one")
    target[key] = value
