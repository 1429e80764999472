"""Arms: named sets of server flags and Gimbal configuration.

Which engine a request goes to and how an engine orders its queue (nearly all of section `queue`)
can be switched while a server runs, so arms that differ in nothing else share one. Flags, other
configuration, and the levels `placement` and `feedback` (which leave experts where they moved
them) need a server of their own.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from gimbal.core.config import LEVELS
from gimbal.core.errors import InputError, nearest

SWITCHABLE = ("dispatch", "queue")
_QUEUE_FIXED = ("ordering", "priority_tokens")
"""Keys of section `queue` that a running server does not change."""


@dataclass(frozen=True)
class Arm:
    """One side of a comparison.

    Attributes:
        name: what reports call it.
        levels: Gimbal's levels that are on; none leaves every decision to vLLM.
        policy: dispatch policy when `dispatch` is on.
        queue_ordering: waiting-queue ordering when `queue` is on.
        flags: vLLM flags added to the server's.
        config: further Gimbal configuration, as in its YAML file.
    """

    name: str
    levels: tuple[str, ...] = ()
    policy: str = "gimbal"
    queue_ordering: str = "gimbal"
    flags: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)

    def switches(self) -> dict[str, Any]:
        """What ``POST /gimbal/control`` is sent before this arm runs."""
        settings: dict[str, Any] = {"levels": list(self.levels)}
        if "dispatch" in self.levels:
            settings["policy"] = self.policy
        if "queue" in self.levels:
            settings["queue_ordering"] = self.queue_ordering
            settings["queue"] = {
                key: value for key, value in self._queue().items() if key not in _QUEUE_FIXED
            }
        return settings

    def _queue(self) -> Mapping[str, Any]:
        section = self.config.get("queue", {})
        return section if isinstance(section, Mapping) else {}

    def server(self, shared: bool) -> ServerSpec:
        """The server this arm runs on; equal for arms that may share it."""
        values = json.loads(json.dumps(dict(self.config)))
        if shared:
            values["levels"] = [x for x in LEVELS if x in SWITCHABLE or x in self.levels]
            values["admin"] = True
            fixed = {key: value for key, value in self._queue().items() if key in _QUEUE_FIXED}
            values.pop("queue", None)
            if fixed:
                values["queue"] = fixed
        else:
            values["levels"] = list(self.levels)
            if "dispatch" in self.levels:
                values.setdefault("dispatch", {})["policy"] = self.policy
            if "queue" in self.levels:
                values.setdefault("queue", {})["ordering"] = self.queue_ordering
        return ServerSpec(self.flags, json.dumps(values, sort_keys=True))

    def to_json(self) -> dict[str, Any]:
        """For records."""
        return {
            "levels": list(self.levels),
            "policy": self.policy if "dispatch" in self.levels else None,
            "queue_ordering": self.queue_ordering if "queue" in self.levels else None,
            "flags": list(self.flags),
            "config": dict(self.config),
        }


@dataclass(frozen=True, slots=True)
class ServerSpec:
    """What a server is started with: vLLM flags, and Gimbal's configuration as JSON."""

    flags: tuple[str, ...]
    config_json: str

    @property
    def shared(self) -> bool:
        """Whether arms can be switched on it while it runs."""
        return bool(json.loads(self.config_json).get("admin", False))


BUILTIN_ARMS = {
    "vllm": Arm("vllm"),
    "vllm-legacy": Arm("vllm-legacy", ("dispatch",), "vllm-legacy"),
    "round-robin": Arm("round-robin", ("dispatch",), "round-robin"),
    "total-tokens": Arm("total-tokens", ("dispatch",), "total-tokens"),
    "lmetric": Arm("lmetric", ("dispatch",), "lmetric"),
    "dynamo": Arm("dynamo", ("dispatch",), "dynamo"),
    "llm-d": Arm("llm-d", ("dispatch",), "llm-d"),
    "gimbal-dispatch": Arm("gimbal-dispatch", ("dispatch",)),
    "sjf": Arm("sjf", ("queue",), queue_ordering="sjf"),
    "hrrn": Arm("hrrn", ("queue",), queue_ordering="hrrn"),
    "gimbal-queue": Arm("gimbal-queue", ("queue",)),
    "gimbal-dispatch-queue": Arm("gimbal-dispatch-queue", ("dispatch", "queue")),
    "gimbal-dp": Arm("gimbal-dp", ("dispatch", "queue")),
    "gimbal-ep": Arm("gimbal-ep", ("placement",)),
    "gimbal-no-feedback": Arm("gimbal-no-feedback", ("dispatch", "queue", "placement")),
    "gimbal": Arm("gimbal", LEVELS),
}


def select_arms(
    names: Sequence[str], levels: Sequence[str] | None = None, file: Path | None = None
) -> list[Arm]:
    """The arms called `names`, in that order; `levels` are those of the arm ``gimbal``.

    Raises InputError for an unknown or repeated name, or a malformed file.
    """
    known = dict(BUILTIN_ARMS)
    if file is not None:
        known |= read_arms(file)
    if levels is not None:
        for level in levels:
            if level not in LEVELS:
                raise InputError(f"--levels: unknown level {level!r}{nearest(level, LEVELS)}")
        known["gimbal"] = replace(known["gimbal"], levels=tuple(levels))
    chosen = []
    for name in names:
        if name not in known:
            raise InputError(f"--arms: unknown arm {name!r}{nearest(name, known)}")
        if known[name] in chosen:
            raise InputError(f"--arms: {name!r} is named twice")
        chosen.append(known[name])
    if not chosen:
        raise InputError("--arms: no arm named")
    return chosen


_KEYS = ("levels", "policy", "queue_ordering", "flags", "config")


def read_arms(file: Path) -> dict[str, Arm]:
    """Arms of a YAML file: ``name: {levels, policy, queue_ordering, flags, config}``.

    Raises InputError naming the file, the arm and the key.
    """
    try:
        document = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"--arms-file {file}: cannot be read: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise InputError(f"--arms-file {file}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(document, dict):
        raise InputError(f"--arms-file {file}: expected a mapping of arm names")
    return {str(name): _arm(f"{file}: {name}", str(name), v) for name, v in document.items()}


def _arm(where: str, name: str, values: Any) -> Arm:
    if not isinstance(values, dict):
        raise InputError(f"--arms-file {where}: expected a mapping")
    for key in values:
        if key not in _KEYS:
            raise InputError(f"--arms-file {where}: unknown key {key!r}{nearest(str(key), _KEYS)}")
    levels = values.get("levels", [])
    if not isinstance(levels, list) or not all(level in LEVELS for level in levels):
        raise InputError(f"--arms-file {where}: levels: expected a list of {', '.join(LEVELS)}")
    flags = values.get("flags", [])
    words = shlex.split(flags) if isinstance(flags, str) else [str(word) for word in flags]
    config = values.get("config", {})
    if not isinstance(config, dict):
        raise InputError(f"--arms-file {where}: config: expected a mapping")
    return Arm(
        name,
        tuple(levels),
        str(values.get("policy", "gimbal")),
        str(values.get("queue_ordering", "gimbal")),
        tuple(words),
        config,
    )
