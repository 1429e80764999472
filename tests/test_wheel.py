"""The wheel: what is in it, what it says of itself, and that it works without vLLM."""

from __future__ import annotations

import email
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from email.message import Message
from pathlib import Path

import numpy as np
import pytest

import gimbal
from scripts.release_notes import notes

ROOT = Path(__file__).resolve().parents[1]
MOST_BYTES = 1 << 20
NOT_INSTALLED = ("vllm", "torch", "transformers", "matplotlib", "highspy")
BLOCKER = f"""
from importlib import metadata
from importlib.machinery import PathFinder

installed, distribution = PathFinder.find_spec, metadata.Distribution.from_name


def find_spec(name, path=None, target=None):
    return None if name.partition(".")[0] in {NOT_INSTALLED!r} else installed(name, path, target)


def from_name(name):
    if name.partition("-")[0] in {NOT_INSTALLED!r}:
        raise metadata.PackageNotFoundError(name)
    return distribution(name)


PathFinder.find_spec, metadata.Distribution.from_name = find_spec, from_name
"""
"""Started with Python (`sitecustomize`): what is not to be there is not found."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "gimbal", source / "gimbal", ignore=ignored)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check"]
    flags = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(built)]
    done = subprocess.run([*pip, *flags, str(source)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    [found] = built.glob("*.whl")
    return found


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        [name] = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        return email.message_from_bytes(archive.read(name))


def test_it_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    tree = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "gimbal").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    own = {name for name in names if ".dist-info/" not in name}
    assert own == tree
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert wheel.stat().st_size < MOST_BYTES


def test_what_it_says_of_itself(wheel: Path) -> None:
    said = metadata(wheel)
    assert said["Name"] == "gimbal-moe"
    assert said["Version"] == gimbal.__version__
    assert said["Requires-Python"] == "<3.14,>=3.11"
    assert said["License-Expression"] == "Apache-2.0"
    assert said["Description-Content-Type"] == "text/markdown"
    assert {"vllm", "cpu", "plot", "exact", "docs"} <= set(said.get_all("Provides-Extra") or [])
    plain = [r for r in said.get_all("Requires-Dist") or [] if "extra ==" not in r]
    assert not [r for r in plain if re.match(r"(vllm|torch|mkdocs|matplotlib)", r)]


def test_a_registry_would_take_it(wheel: Path) -> None:
    if importlib.util.find_spec("twine") is None and shutil.which("twine") is None:
        pytest.skip("twine is not installed")
    twine = shutil.which("twine")
    command = [twine] if twine else [sys.executable, "-m", "twine"]
    done = subprocess.run(
        [*command, "check", "--strict", str(wheel)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_it_works_without_vllm(wheel: Path, tmp_path: Path) -> None:
    packages = tmp_path / "packages"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(packages)
    (packages / "sitecustomize.py").write_text(BLOCKER)

    # Compiling for a folder that goes away again takes a minute; the same code runs as Python.
    environment = os.environ | {"PYTHONPATH": str(packages), "NUMBA_DISABLE_JIT": "1"}

    def run(*words: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "gimbal.cli", *map(str, words)],
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
            env=environment,
        )

    where = [sys.executable, "-c", "import gimbal; print(gimbal.__file__)"]
    shown = subprocess.run(
        where, capture_output=True, text=True, check=True, cwd=tmp_path, env=environment
    )
    assert shown.stdout.startswith(str(packages))

    counts = tmp_path / "counts.npz"
    np.savez(counts, counts=np.random.default_rng(0).integers(1, 1000, (2, 3, 16)))
    simulate = ["simulate", "--requests", "40", "--rate", "20", "--jobs", "1"]
    for words in (
        ["--version"],
        ["config"],
        [*simulate, "--out", "run"],
        ["report", "run"],
        ["place", "--routing", counts, "--ranks", "2"],
    ):
        done = run(*words)
        assert done.returncode == 0, (words, done.stderr)
    for words, needed in (
        (["serve", "model"], "vllm"),
        (["place", "--routing", counts, "--ranks", "2", "--exact"], "gimbal-moe[exact]"),
        ([*simulate[:1], "--trace", "burst", "--requests", "9", "--plot-trace", "x.png"], "plot"),
    ):
        done = run(*words)
        assert done.returncode == 2, (words, done.stdout, done.stderr)
        assert needed in done.stderr
        assert len(done.stderr.splitlines()) <= 4, done.stderr


def test_the_version_is_the_one_of_the_changelog() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    first = re.search(r"^## (\S+)", text, re.MULTILINE)
    assert first is not None
    assert first[1] == gimbal.__version__
    assert json.dumps(gimbal.__version__) not in (ROOT / "pyproject.toml").read_text()


def test_release_notes_are_those_of_one_version() -> None:
    text = (
        "# Changes\n\n## 0.3.0 (unreleased)\n- c\n\n## 0.2.0 (2026-12-01)\n\n- b\n\n## 0.1.0\n- a\n"
    )
    assert notes(text, "0.2.0") == "- b\n"
    assert notes(text, "0.1.0") == "- a\n"
    with pytest.raises(ValueError, match="not released"):
        notes(text, "0.3.0")
    with pytest.raises(ValueError, match=r"no section 0\.2"):
        notes(text, "0.2")
