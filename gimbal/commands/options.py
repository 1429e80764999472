"""What the options of every command are made of: numbers in range, files that can be written.

A bad value is `InputError`, one line as everywhere, and not click's usage error of four.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from gimbal.core.errors import InputError
from gimbal.core.files import writing
from gimbal.core.numbers import MOST, MOST_COUNT, as_real, as_whole, real, whole

FIGURES = (".png", ".svg", ".pdf", ".jpg", ".jpeg", ".webp", ".eps", ".ps", ".tif", ".tiff")
"""Endings of a plot's file that say what it is."""


class Whole(click.IntRange):
    """A whole number from `least` to `most`; the help shows `least` alone, `most` being absurd."""

    name = "integer"

    def __init__(self, least: int = 0, most: int | None = None) -> None:
        super().__init__(min=least)
        self._least, self._most = least, MOST_COUNT if most is None else most

    def convert(self, value: Any, param: click.Parameter | None, ctx: Any) -> int:
        number = as_whole(value)
        return whole(value if number is None else number, _name(param), self._least, self._most)


class Real(click.FloatRange):
    """A finite number from `least` to `most`; with `above` greater than that."""

    name = "float"

    def __init__(
        self, least: float = 0.0, most: float | None = None, above: float | None = None
    ) -> None:
        super().__init__(least if above is None else above, min_open=above is not None)
        self._least = -MOST if above is not None else least
        self._most, self._above = MOST if most is None else most, above

    def convert(self, value: Any, param: click.Parameter | None, ctx: Any) -> float:
        number = as_real(value)
        shown = value if number is None else number
        return real(shown, _name(param), self._least, self._most, self._above)


class NameOrFile(click.types.StringParamType):
    """What has a packaged name or is a file; a shell completes both.

    Args:
        names: gives those names when a shell asks for them.
    """

    name = "name or file"

    def __init__(self, names: Callable[[], Iterable[str]] = tuple) -> None:
        self._names = names

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        named = [CompletionItem(n) for n in self._names() if n.startswith(incomplete)]
        return [*named, CompletionItem(incomplete, type="file")]


class OutFile(click.Path):
    """A file to write, refused before any work is done for it where it cannot be.

    Args:
        endings: of its name; empty takes any.
    """

    def __init__(self, endings: tuple[str, ...] = ()) -> None:
        super().__init__(path_type=Path)
        self._endings = endings

    def convert(self, value: Any, param: click.Parameter | None, ctx: Any) -> Path:
        path, name = Path(value), f"{_name(param)}{value}"
        if self._endings and path.suffix.lower() not in self._endings:
            raise InputError(
                f"{name}: cannot be written: expected a name that ends in "
                f"{', '.join(self._endings[:-1])} or {self._endings[-1]}"
            )
        with writing(name):
            if path.is_dir():
                raise InputError(f"{name}: cannot be written: it is a folder")
            _require_folder(path.parent, name)
        return path


class OutFolder(click.Path):
    """A folder to write into, made where it is absent; refused where that is not possible."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: Any) -> Path:
        path, name = Path(value), f"{_name(param)}{value}"
        with writing(name):
            present = next(folder for folder in (path, *path.parents) if folder.exists())
            _require_folder(present, name)
        return path


def parse_loads(text: str) -> tuple[float, ...]:
    """Of ``--loads``: shares of a capacity; raises InputError."""
    return tuple(real(part.strip(), "--loads ", most=1000.0, above=0.0) for part in text.split(","))


def _require_folder(folder: Path, name: str) -> None:
    if not folder.is_dir():
        kind = "is no folder" if folder.exists() else "does not exist"
        raise InputError(f"{name}: cannot be written: {folder} {kind}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"{name}: cannot be written: no permission to write in {folder}")


def _name(param: click.Parameter | None) -> str:
    """What a complaint begins with: the option as it is typed."""
    return "" if param is None else f"{param.opts[0]} "
