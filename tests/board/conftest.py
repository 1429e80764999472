"""What tests of the board share: a folder of its kind, rows, and processes that use a board."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gimbal.board.file import board_directory, board_path

Start = Callable[..., Any]


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder on the file system real boards live on."""
    path = Path(tempfile.mkdtemp(prefix="gimbal-test-", dir=board_directory()))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def path(folder: Path) -> Path:
    """Of the board of the server ``server`` in `folder`; there is no file yet."""
    return board_path("server", folder)


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts Python code in a process of its own, with pipes; ended with the test."""
    running: list[subprocess.Popen[str]] = []

    def run(code: str, *arguments: object, prefix: tuple[str, ...] = ()) -> subprocess.Popen[str]:
        command = [*prefix, sys.executable, "-c", code, *map(str, arguments)]
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
        running.append(process)
        return process

    yield run
    for process in running:
        if process.poll() is None:
            process.kill()
        process.communicate()
