"""YAML that a user wrote: no key twice, every number finite, its size and its aliases bounded."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from gimbal.core.errors import InputError, one_line
from gimbal.core.files import is_unicode, read_text
from gimbal.core.numbers import shown

MOST_BYTES = 1 << 20
MOST_VALUES = 200_000
"""Values with every alias written out: a short text can name one list a billion times."""
DEPTH = 50
"""Deepest nesting that is read."""


class _Loader(yaml.SafeLoader):
    """Says the line of whatever it cannot make a value of."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
        except yaml.YAMLError:
            raise
        except Exception as error:  # a month 13 or !!int "": its constructors check little
            raise _refused(node, f"{one_line(error)[:80]} in {shown(node.value)}") from None
        if isinstance(value, str) and not is_unicode(value):
            raise _refused(node, "half a surrogate pair")
        if not isinstance(value, str | int | float | list | dict | None):
            raise _refused(node, f"a value of type {type(value).__name__}: quote what is text")
        if isinstance(value, int | float) and not -(2**64) < value < 2**64:  # NaN is neither
            raise _refused(node, "expected a finite number of less than 2**64")
        return value


def read_yaml(path: Path, name: str | None = None) -> Any:
    """The document of a file; None for an empty one.

    Args:
        name: what complaints call the file; None is its path.

    Raises InputError that names file and line, see `parse_yaml`.
    """
    name = str(path) if name is None else name
    return parse_yaml(read_text(path, name, MOST_BYTES), name)


def parse_yaml(text: str, where: str) -> Any:
    """The document that `text` is.

    Raises InputError for what is not YAML, a key given twice, a number that is not finite, and
    more than `MOST_VALUES` values.
    """
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _size(node, {})
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark is not None else ""
        reason = getattr(error, "problem", None) or getattr(error, "reason", None) or error
        raise InputError(f"{where}{line}: not YAML ({one_line(reason)})") from None
    except RecursionError:
        raise InputError(f"{where}: nested deeper than {DEPTH} levels") from None


def _refused(node: yaml.Node, reason: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=reason, problem_mark=node.start_mark)


def _size(node: yaml.Node, known: dict[yaml.Node, tuple[int, int] | None]) -> tuple[int, int]:
    """(values, levels) below `node`, aliases written out.

    Args:
        known: sizes of nodes that were seen; None while one's own is being found.

    Raises for too many of either, a key given twice, and what contains itself.
    """
    if node in known:
        size = known[node]
        if size is None:
            raise _refused(node, "it contains itself")
        return size
    known[node] = None
    values, levels = 1, 0
    for child in _children(node):
        below, deep = _size(child, known)
        values, levels = values + below, max(levels, deep + 1)
        if values > MOST_VALUES or levels > DEPTH:
            much = f"{MOST_VALUES} values" if values > MOST_VALUES else f"{DEPTH} levels"
            raise _refused(node, f"more than {much}, aliases written out")
    known[node] = values, levels
    return values, levels


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        lines: dict[Hashable, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _refused(key, "expected a key of one word")
            name = (key.tag, key.value)
            if name in lines:
                first = lines[name]
                raise _refused(key, f"key {key.value!r} is given twice, first in line {first}")
            lines[name] = key.start_mark.line + 1
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []
