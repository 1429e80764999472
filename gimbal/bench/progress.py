"""The progress bar of a benchmark on a terminal: one task per turn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn


class TurnBar:
    """The bar itself; see `turn_bar`."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task = progress.add_task("starting", total=None, state="")

    def start(self, description: str) -> None:
        """A turn begins."""
        self._progress.reset(self._task, description=description, total=None, state="")

    def update(self, ended: int, streams: int) -> None:
        """Requests that have ended, streams that are open."""
        self._progress.update(self._task, completed=ended, state=f"{ended} done, {streams} open")


@contextmanager
def turn_bar(console: Console) -> Iterator[TurnBar]:
    """Shows a bar on `console` while the context lasts; nothing where it is no terminal."""
    progress = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[state]}", markup=False),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )
    with progress:
        yield TurnBar(progress)
