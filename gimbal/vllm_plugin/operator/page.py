"""The live page: one document, put together from ``live/``, that loads nothing else."""

from __future__ import annotations

from functools import lru_cache
from importlib import resources

_STYLE, _SCRIPT = "/* style */", "/* script */"
_SCRIPTS = ("charts.js", "engines.js", "decisions.js", "queue.js", "experts.js", "main.js")

PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; connect-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-cache",
}
"""A browser refuses what the page never does: to load from, or tell, anybody else."""


@lru_cache(maxsize=1)
def page() -> str:
    """The HTML, with styles and scripts inside."""
    folder = resources.files("gimbal.vllm_plugin.operator").joinpath("live")

    def text(name: str) -> str:
        return folder.joinpath(name).read_text(encoding="utf-8")

    html = text("page.html").replace(_STYLE, text("style.css"))
    return html.replace(_SCRIPT, "".join(map(text, _SCRIPTS)))
