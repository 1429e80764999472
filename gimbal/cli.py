"""The ``gimbal`` command: one thin module per job in ``gimbal.commands``, imported on use."""

from __future__ import annotations

import contextlib
import os
import sys
from importlib import import_module
from typing import NoReturn

import click

from gimbal import __version__
from gimbal.core.errors import InputError

INTERRUPTED = 128 + 2
"""Exit code of a command that SIGINT has ended, as shells have it. What `KeyboardInterrupt` says
then stands in the one line: how to go on."""

COMMANDS = {
    "serve": "vLLM's OpenAI server with Gimbal on",
    "bench": "replay a trace against live servers and compare arms in turns",
    "simulate": "answer 'what would it do on my cluster and trace?' offline",
    "goodput": "find the highest rate at which requests keep their targets, simulated",
    "reproduce": "repeat evaluations: the paper's, simulated or live, and other regimes",
    "place": "plan an expert placement from recorded routing",
    "top": "watch a running server in the terminal",
    "stats": "show or save a running server's routing statistics",
    "calibrate": "measure this machine and write a cost-model profile",
    "report": "one HTML page from the records of a run",
    "model": "make and measure the demo model",
    "doctor": "check Python, vLLM, every patched symbol and the machine",
    "config": "print the effective configuration",
}


class LazyGroup(click.Group):
    """Imports ``gimbal.commands.NAME`` only when NAME runs or asks for its own help."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = import_module(f"gimbal.commands.{cmd_name}")
        command: click.Command = module.command
        return command

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as interrupt:
            _fail(": ".join(("interrupted", *interrupt.args)), INTERRUPTED)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="gimbal")
def gimbal() -> None:
    """Gimbal: dispatch, queue and expert placement for MoE serving on vLLM."""


def main() -> None:
    """Runs the command line; bad input is one line on standard error and exit code 2.

    So is what a file system refuses of a named file, with exit code 1, and an interruption, with
    `INTERRUPTED`; bugs keep their traceback.
    Policies named ``module:Class`` are also looked for in the current directory, after all else.
    """
    with contextlib.suppress(OSError):  # the directory may be gone
        sys.path.append(os.getcwd())
    try:
        gimbal.main(prog_name="gimbal", standalone_mode=True)
    except InputError as error:
        _fail(error, 2)
    except OSError as error:
        if error.filename is None:
            raise
        _fail(f"{error.filename}: {error.strerror}", 1)


def _fail(reason: object, code: int) -> NoReturn:
    """Ends the process with one line."""
    print(f"gimbal: {' '.join(str(reason).splitlines())}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
