"""Every command that `gimbal` has, found by asking it: a new one is in these tests by itself."""

from __future__ import annotations

from collections.abc import Iterator

import click

from gimbal.cli import gimbal


def leaves(command: click.Command = gimbal, path: str = "") -> Iterator[tuple[str, click.Command]]:
    """Every command that is no group, with the words that name it."""
    if not isinstance(command, click.Group):
        yield path, command
        return
    context = click.Context(command)
    for name in command.list_commands(context):
        inner = command.get_command(context, name)
        assert inner is not None
        yield from leaves(inner, f"{path} {name}".strip())


LEAVES = dict(leaves())
