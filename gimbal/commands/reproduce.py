"""``gimbal reproduce``: hands over to the laboratory, which a checkout has and a wheel has not."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import click

import gimbal
from gimbal.core.errors import InputError


def laboratory(module: str) -> ModuleType:
    """`module` of the package ``reproduction`` beside `gimbal`; InputError outside a checkout."""
    root = Path(gimbal.__file__).resolve().parents[1]
    if not (root / "reproduction" / "command.py").exists():
        raise InputError(
            "the reproduction is not part of the installed package: run it from a checkout of "
            "Gimbal's repository (folder reproduction/)"
        )
    if str(root) not in sys.path:
        sys.path.append(str(root))  # processes that it spawns inherit the path
    return import_module(f"reproduction.{module}")


def __getattr__(name: str) -> click.Command:
    """The command itself, looked up when it is asked for."""
    if name != "command":
        raise AttributeError(name)
    command: click.Command = laboratory("command").command
    return command
