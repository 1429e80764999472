"""Blocks of a page that scripts write; what stands around them is written by hand."""

from __future__ import annotations


def put(page: str, name: str, text: str) -> str:
    """`page` with `text` between the marks of `name`; at its end where it has none."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    piece = f"{begin}\n{text.strip()}\n{end}"
    if begin not in page:
        return f"{page.rstrip()}\n\n{piece}\n"
    head, _, rest = page.partition(begin)
    return head + piece + rest.partition(end)[2]
