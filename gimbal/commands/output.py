"""What every command prints on: JSON, tables and notes; names of the user's are no markup."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

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


class Bar:
    """What a command does at the moment, and how far it is; see `progress_bar`."""

    def __init__(self, progress: Progress, work: str) -> None:
        self._progress, self._work = progress, work
        self._task = progress.add_task(work, total=None, state="")

    def say(self, text: str) -> None:
        """What is done before the work itself, or a part of it, of a length that is not known."""
        self._progress.remove_task(self._task)
        self._task = self._progress.add_task(text, total=None, state="")

    def update(self, done: int, total: int) -> None:
        """Parts of the work that are done, and all."""
        self._progress.update(
            self._task,
            description=self._work,
            completed=done,
            total=total,
            state=f"{done}/{total}",
        )

    def requests(self, ended: int, streams: int) -> None:
        """Requests that have ended, streams that are open."""
        self._progress.update(self._task, completed=ended, state=f"{ended} done, {streams} open")


@contextmanager
def progress_bar(console: Console, work: str) -> Iterator[Bar]:
    """Shows a bar on `console` while the context lasts; nothing where it is no terminal.

    Whatever may take longer than two seconds has one. Results are printed after it: while it lasts
    what is printed goes to `console`.
    """
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(24),
        TextColumn("{task.fields[state]}", markup=False),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    shown = console.is_terminal
    with Progress(*columns, console=console, disable=not shown, transient=True) as progress:
        yield Bar(progress, work)
