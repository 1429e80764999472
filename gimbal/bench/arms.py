"""What an arm needs of a live server: what it is started with, and what is switched while it runs.

The dispatch policy and the queue's ordering, each with its options, and nearly all of section
`queue` can be switched while a server runs, so arms that differ in nothing else share one. Flags,
other configuration, and the levels `placement` and `feedback` (which leave experts where they moved
them) need a server of their own.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from gimbal.core.config import LEVELS
from gimbal.core.errors import InputError
from gimbal.report.arms import Arm

SWITCHABLE = ("dispatch", "queue")
_QUEUE_FIXED = ("priority_tokens",)
"""Keys of section `queue` that a running server does not change."""


@dataclass(frozen=True, slots=True)
class ServerSpec:
    """What a server is started with: vLLM flags, and Gimbal's configuration as JSON."""

    flags: tuple[str, ...]
    config_json: str

    @property
    def shared(self) -> bool:
        """Whether arms can be switched on it while it runs."""
        return bool(json.loads(self.config_json).get("admin", False))


def switches(arm: Arm) -> dict[str, Any]:
    """What ``POST /gimbal/control`` is sent before `arm` runs."""
    settings: dict[str, Any] = {"levels": list(arm.levels)}
    config = arm.gimbal_config()
    if "dispatch" in arm.levels:
        settings["policy"] = config.dispatch.policy
        if config.dispatch.options:
            settings["policy_options"] = dict(config.dispatch.options)
    if "queue" in arm.levels:
        settings["queue_ordering"] = config.queue.ordering
        settings["queue"] = {
            key: value
            for key, value in _section(arm, "queue").items()
            if key != "ordering" and key not in _QUEUE_FIXED
        }
    return settings


def server_spec(arm: Arm, shared: bool) -> ServerSpec:
    """The server that `arm` runs on; equal for arms that may share it."""
    values = json.loads(json.dumps(dict(arm.config)))
    values["levels"] = list(arm.levels)
    if shared:
        values["levels"] = [x for x in LEVELS if x in SWITCHABLE or x in arm.levels]
        values["admin"] = True
        dispatch, queue = _section(arm, "dispatch"), _section(arm, "queue")
        fixed = {
            "dispatch": {k: v for k, v in dispatch.items() if k not in ("policy", "options")},
            "queue": {k: v for k, v in queue.items() if k in _QUEUE_FIXED},
        }
        for section, own in fixed.items():
            values.pop(section, None)
            if own:
                values[section] = own
    return ServerSpec(arm.flags, json.dumps(values, sort_keys=True))


def _section(arm: Arm, name: str) -> dict[str, Any]:
    section = arm.config.get(name, {})
    return dict(section) if isinstance(section, Mapping) else {}


def refuse_simulated(arms: Iterable[Arm]) -> None:
    """Raises InputError for an arm that no server can run."""
    for arm in arms:
        if arm.simulated is not None:
            raise InputError(f"--arms: {arm.name!r} is for `gimbal simulate` only")


def needs_own_server(arm: Arm) -> bool:
    """Whether a server that somebody else started cannot be switched to `arm`."""
    values = json.loads(server_spec(arm, shared=True).config_json)
    return bool(arm.flags) or set(values) != {"levels", "admin"}
