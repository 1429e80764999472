"""docs/traces.md is what the table of formats says."""

from __future__ import annotations

from pathlib import Path

import pytest

from gimbal.workloads.formats import FORMATS, UNREAD

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def test_the_page_is_not_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)
    import traces_page

    page = traces_page.page()
    assert page.count("\n| ") >= len(FORMATS) + len(UNREAD)
    assert traces_page.OUT.read_text() == page, "run make pages"
