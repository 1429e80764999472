"""A hook of MkDocs for what lies outside docs/: figures come along, other links become paths."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FIGURES = "reproduction/results"
_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(\.\./([^)\s#]+)(?:#[^)\s]*)?\)")
_FIGURE = re.compile(rf"(!\[[^\]]*\]\()\.\./({FIGURES}/[^)\s]+\))")


def on_files(files: Any, config: Any) -> Any:
    """Adds the figures of the results to the site."""
    from mkdocs.structure.files import File

    for path in sorted((ROOT / FIGURES).glob("*.svg")):
        name = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The page with ``[text](../path)`` as ``text (`path`)``, and figures where they are now."""
    return _LINK.sub(lambda link: f"{link[1]} (`{link[2]}`)", _FIGURE.sub(r"\1\2", markdown))
