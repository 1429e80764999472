"""docs/traces.md is what the table of formats says."""

from __future__ import annotations

from gimbal.workloads.formats import FORMATS, UNREAD
from scripts import traces_page


def test_the_page_is_not_stale() -> None:
    page = traces_page.page()
    assert page.count("\n| ") >= len(FORMATS) + len(UNREAD)
    assert traces_page.OUT.read_text() == page, "run make pages"
