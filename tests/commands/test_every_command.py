"""What every command has: an example in its help that it would take, and completion by a shell."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys

import click
import pytest

from gimbal import __version__
from tests.commands.leaves import LEAVES
from tests.test_docs_commands import fault


@pytest.mark.parametrize("path", LEAVES)
def test_the_help_has_an_example(path: str) -> None:
    command = LEAVES[path]
    with click.Context(command, info_name=f"gimbal {path}") as context:
        text = " ".join(command.get_help(context).split())
    example = text.partition("Example: ")[2].partition(" Options:")[0]
    words = shlex.split(example)
    assert words[: 1 + len(path.split())] == ["gimbal", *path.split()]
    assert fault(words) is None


def test_python_runs_the_package_as_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "gimbal", "--version"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout == f"gimbal, version {__version__}\n"


def completed(words: str, shell: str = "bash") -> list[str]:
    """What `shell` is told for the last, unfinished word."""
    variables = {
        "_GIMBAL_COMPLETE": f"{shell}_complete",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split(" ")) - 1),
    }
    done = subprocess.run(
        [sys.executable, "-m", "gimbal.cli"],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stderr == ""
    return done.stdout.splitlines()


def test_a_shell_completes_commands_options_and_names() -> None:
    assert completed("gimbal si") == ["plain,simulate"]
    assert completed("gimbal reproduce re") == ["plain,regimes"]
    assert completed("gimbal simulate --clus") == ["plain,--cluster"]
    assert completed("gimbal simulate --cluster h100x4-pa") == [
        "plain,h100x4-paper",
        "file,h100x4-pa",
    ]
    assert completed("gimbal report runs/a") == ["file,runs/a"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_a_shell(shell: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "gimbal.cli"],
        env=os.environ | {"_GIMBAL_COMPLETE": f"{shell}_source"},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "_GIMBAL_COMPLETE" in done.stdout
    assert done.stderr == ""
