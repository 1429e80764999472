"""Policies by name: built-in, installed as an entry point, or ``module:Class``.

Registering a built-in is one line in its package's ``__init__``; nothing heavier than the name is
loaded until somebody asks for it, so that five server processes do not import every baseline. A
package of somebody else's names its policies as entry points of the registry's group.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from gimbal.core.errors import InputError, PolicyError, nearest, with_type
from gimbal.core.options import parse_options

T = TypeVar("T")


class Registry(Generic[T]):
    """Maps a name to a policy class.

    A class that declares ``Options``, a frozen dataclass, is built with one of these as its only
    argument; any other with no argument.

    Args:
        kind: what errors call an entry, such as "dispatch policy".
        group: entry-point group in which other packages name theirs.
        methods: names that every entry must have as methods.
        declared: of a class the further methods that what it declares to be able to do needs.
    """

    def __init__(
        self,
        kind: str,
        group: str,
        methods: tuple[str, ...],
        declared: Callable[[Any], tuple[str, ...]] = lambda _: (),
    ) -> None:
        self.kind = kind
        self.group = group
        self.methods = methods
        self._declared = declared
        self._targets: dict[str, str] = {}

    def register(self, name: str, target: str) -> None:
        """Adds the built-in `name`, ``"module:Class"``; raises ValueError when it is taken."""
        if name in self._targets:
            raise ValueError(f"{self.kind} {name!r} is registered twice")
        self._targets[name] = target

    def load(self, name: str) -> type[T]:
        """The class behind `name`, imported.

        Raises InputError when nobody provides it, it cannot be imported or lacks a method.
        """
        if name in self._targets:
            found: type[T] = _attribute(self._targets[name])
            return found
        point = _installed(self.group).get(name)
        if point is None and ":" not in name:
            raise InputError(f"unknown {self.kind} {name!r}{nearest(name, self.names())}")
        try:
            loaded = point.load() if point is not None else _attribute(name)
            methods = (*self.methods, *self._declared(loaded))
        except (Exception, SystemExit) as error:
            text = f"{self.kind} {name!r} cannot be imported: {with_type(error)}"
            raise InputError(text) from error
        for method in methods:
            if not callable(getattr(loaded, method, None)):
                raise InputError(f"{self.kind} {name!r} ({loaded!r}) has no method {method}")
        return loaded  # type: ignore[no-any-return]

    def options(self, name: str, values: Mapping[str, Any] | None = None, where: str = "") -> Any:
        """The ``Options`` of `name` filled from `values`, or None when it declares none.

        Raises InputError for an unknown option or a bad value; the message starts with `where`.
        """
        declared = getattr(self.load(name), "Options", None)
        where = where or f"{self.kind} {name!r}"
        if declared is None:
            for key in values or {}:
                raise InputError(f"{where}: unknown option {key!r} ({name!r} has no options)")
            return None
        if not (isinstance(declared, type) and dataclasses.is_dataclass(declared)):
            raise InputError(f"{self.kind} {name!r}: Options is no dataclass: {declared!r}")
        try:
            return parse_options(declared, values or {}, where)
        except InputError:
            raise
        except Exception as error:  # a type that cannot be checked, say
            text = f"{self.kind} {name!r}: Options cannot be read: {with_type(error)}"
            raise InputError(text) from error

    def build(self, name: str, values: Mapping[str, Any] | None = None) -> T:
        """The policy `name` with options `values`; raises InputError, also for what it raises."""
        return self._made(name, self.options(name, values))

    def _made(self, name: str, options: Any) -> T:
        policy: Any = self.load(name)
        try:
            built: T = policy() if options is None else policy(options)
        except InputError:
            raise
        except (Exception, SystemExit) as error:
            raise PolicyError(f"{self.kind} {name!r} cannot be made: {with_type(error)}") from error
        return built

    def check(
        self,
        name: object,
        values: Mapping[str, Any],
        where: str,
        key: str,
        options_key: str | None = None,
    ) -> None:
        """Raises InputError unless `name` can be built with `values`.

        A built-in without options is known to be good and is not imported for it.

        Args:
            where: the source of the configuration.
            key: what holds the name there.
            options_key: what holds `values`; None is ``options`` beside `key`.
        """
        if not isinstance(name, str):
            raise InputError(f"{where}: {key}: expected a name, got {name!r}")
        if name in self._targets and not values:
            return
        known = name in self._targets or name in _installed(self.group) or ":" in name
        if not known:
            raise InputError(f"{where}: {key}: unknown {name!r}{nearest(name, self.names())}")
        if options_key is None:
            options_key = ".".join([*key.split(".")[:-1], "options"])
        try:
            self._made(name, self.options(name, values, f"{where}: {options_key}"))
        except InputError as error:
            text = str(error)
            prefix = "" if text.startswith(where) else f"{where}: {key}: "
            raise InputError(prefix + text) from error

    def names(self) -> list[str]:
        """Every name that is known without importing: built-in first, then installed."""
        return [*self._targets, *(n for n in _installed(self.group) if n not in self._targets)]

    def __contains__(self, name: object) -> bool:
        return name in self._targets

    def __iter__(self) -> Iterator[str]:
        """Names of the built-in entries."""
        return iter(self._targets)


def _attribute(target: str) -> Any:
    module, _, attribute = target.partition(":")
    found: Any = import_module(module)
    for part in attribute.split("."):
        found = getattr(found, part)
    return found


@cache
def _installed(group: str) -> dict[str, EntryPoint]:
    """Entry points of `group` by name; of two with one name the first by package counts."""
    points = sorted(
        entry_points(group=group), key=lambda p: (p.dist.name if p.dist else "", p.name)
    )
    return {point.name: point for point in reversed(points)}
