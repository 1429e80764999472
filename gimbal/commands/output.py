"""What every command prints on: JSON, tables and notes; names of the user's are no markup."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from gimbal.core.json_text import to_json

PIPE_COLUMNS = 160


def echo_json(values: Any, indent: int | None = None) -> None:
    """Prints what ``--json`` asks for: one JSON value; NaN and infinities are null."""
    click.echo(to_json(values, indent=indent))


def notes() -> Console:
    """Standard error, for what is no result."""
    return Console(stderr=True, markup=False)


def tables() -> Console:
    """Standard output; a pipe has no width, and lines there are cut late."""
    console = Console(markup=False)
    return console if console.is_terminal else Console(markup=False, width=PIPE_COLUMNS)


class RunBar:
    """The bar of simulated runs; see `progress_bar`."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task = progress.add_task("simulating", total=None)

    def say(self, text: str) -> None:
        """What is done before the runs, whose number is not known yet."""
        self._progress.update(self._task, description=text)

    def update(self, done: int, total: int) -> None:
        """Runs that have ended, and all."""
        self._progress.update(self._task, description="simulating", completed=done, total=total)


@contextmanager
def progress_bar(console: Console) -> Iterator[RunBar]:
    """Shows a bar on `console` while the context lasts; nothing where it is no terminal."""
    text = TextColumn("{task.description}", markup=False)
    columns = (text, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield RunBar(progress)
