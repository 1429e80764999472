"""The documentation as a site: every page is in its navigation, and it builds without a warning."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from scripts.site_links import on_page_markdown
from tests.test_docs import ROOT


def named(nav: Any) -> Iterator[str]:
    """Pages of a navigation, in its order."""
    if isinstance(nav, str):
        yield nav
    for part in nav.values() if isinstance(nav, dict) else nav if isinstance(nav, list) else ():
        yield from named(part)


def test_every_page_is_in_the_navigation_once() -> None:
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    pages = sorted(path.relative_to(ROOT / "docs").as_posix() for path in ROOT.glob("docs/**/*.md"))
    assert sorted(named(nav)) == pages


def test_what_lies_outside_becomes_its_path() -> None:
    text = (
        "[a](../gimbal/cli.py) [b](rollout.md#leaving) [c](../README.md#x) "
        "![d](../reproduction/results/h100-steps.svg)"
    )
    assert on_page_markdown(text) == (
        "a (`gimbal/cli.py`) [b](rollout.md#leaving) c (`README.md`) "
        "![d](reproduction/results/h100-steps.svg)"
    )


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    beside = Path(sys.executable).with_name("mkdocs")
    mkdocs = str(beside) if beside.exists() else shutil.which("mkdocs")
    if mkdocs is None:
        pytest.skip("needs the extra `docs`")
    built = subprocess.run(
        [mkdocs, "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    assert "check_dispatch_policy" in (tmp_path / "api" / "index.html").read_text(encoding="utf-8")
