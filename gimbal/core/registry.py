"""Name -> factory registries whose entries are imported on first use.

Registering a policy is one line in its package's ``__init__``; nothing heavier than the name is
loaded until somebody asks for it, so that five server processes do not import every baseline.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Any, Generic, TypeVar

from gimbal.core.errors import InputError, nearest

T = TypeVar("T")


class Registry(Generic[T]):
    """Maps a name to ``"module:attribute"``; the attribute is called to build the object."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._targets: dict[str, str] = {}

    def register(self, name: str, target: str) -> None:
        """Adds `name`; raises ValueError when it is taken."""
        if name in self._targets:
            raise ValueError(f"{self.kind} {name!r} is registered twice")
        self._targets[name] = target

    def build(self, name: str, *args: Any, **kwargs: Any) -> T:
        """Builds the object registered as `name`; raises InputError naming the nearest one."""
        if name not in self._targets:
            raise InputError(f"unknown {self.kind} {name!r}{nearest(name, self._targets)}")
        module, _, attribute = self._targets[name].partition(":")
        built: T = getattr(import_module(module), attribute)(*args, **kwargs)
        return built

    def __contains__(self, name: object) -> bool:
        return name in self._targets

    def __iter__(self) -> Iterator[str]:
        return iter(self._targets)
