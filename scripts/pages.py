"""Pages that scripts write: whole ones, and blocks between what is written by hand."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def put(page: str, name: str, text: str) -> str:
    """`page` with `text` between the marks of `name`; at its end where it has none."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    piece = f"{begin}\n{text.strip()}\n{end}"
    if begin not in page:
        return f"{page.rstrip()}\n\n{piece}\n"
    head, _, rest = page.partition(begin)
    return head + piece + rest.partition(end)[2]


def keep(out: Path, text: str, about: str) -> int:
    """Writes the page, or with --check tells whether it is stale; returns the exit code."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; 1 when stale")
    check = parser.parse_args().check
    if not check:
        out.write_text(text, encoding="utf-8")
        return 0
    if out.exists() and out.read_text(encoding="utf-8") == text:
        return 0
    print(f"{out}: stale; run make pages", file=sys.stderr)
    return 1
