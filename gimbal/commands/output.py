"""What every command prints on: JSON, tables and notes; names of the user's are no markup."""

from __future__ import annotations

from typing import Any

import click
from rich.console import Console

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
