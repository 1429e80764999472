"""Writes docs/configuration.md: every option with its default, from the configuration's schema.

    .venv/bin/python -m scripts.configuration_page [--check]

The page is made from the text that `gimbal config` prints. With --check nothing is written, and
the exit code is 1 when the page is stale.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gimbal.core.config import GimbalConfig
from gimbal.core.config_sources import to_yaml
from scripts.pages import keep

OUT = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"

HEAD = """# Configuration

One schema serves every way in. The sources are, lowest first: the defaults, the YAML file of
`--gimbal-config FILE`, vLLM's `--additional-config '{"gimbal": {...}}'`, and the flags of
`gimbal serve` such as `--levels`. A later source wins key by key.

`gimbal config` prints all options as YAML, which is a valid file for `--gimbal-config`. An unknown
key, an unknown name and a value out of range are refused with one line that names the key and
the nearest valid one.

Each level has a page that explains its options: [dispatch](dispatch.md), [queue](queue.md),
[placement](placement.md), [feedback](feedback.md). The options below belong to the policies that
are chosen by default; `gimbal config --gimbal-config FILE` prints those of another choice.
[Writing a policy](writing-a-policy.md) tells how to bring one's own.

`make pages` writes this page from the schema.
"""

_COMMENT = re.compile(r"\s*#\s?(.*)")
_ENTRY = re.compile(r"(\s*)([\w-]+):\s*(.*)")


@dataclass(frozen=True, slots=True)
class Entry:
    """One key of the configuration.

    Attributes:
        path: keys from the top level down to this one.
        value: its default as YAML; empty for a section.
        text: the comment above it.
    """

    path: tuple[str, ...]
    value: str
    text: str

    @property
    def is_section(self) -> bool:
        """Whether further keys stand below this one."""
        return not self.value


def entries(text: str) -> Iterator[Entry]:
    """The keys of commented YAML in block style with values of one line, in order.

    Raises ValueError for any other line.
    """
    comment: list[str] = []
    above: list[tuple[int, str]] = []  # (indentation, key) of the sections around this line
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        if found := _COMMENT.fullmatch(line):
            comment.append(found[1])
            continue
        found = _ENTRY.fullmatch(line)
        if found is None:
            raise ValueError(f"line {number}: neither a comment nor `key: value`: {line!r}")
        indent, key, value = len(found[1]), found[2], found[3]
        above = [section for section in above if section[0] < indent]
        yield Entry((*(name for _, name in above), key), value, " ".join(comment))
        comment = []
        if not value:
            above.append((indent, key))


def page(text: str) -> str:
    """The page for `text`, the commented YAML of the configuration: one table per section."""
    about: dict[tuple[str, ...], str] = {(): ""}
    rows: dict[tuple[str, ...], list[str]] = {(): []}
    for entry in entries(text):
        if entry.is_section:
            about[entry.path] = entry.text
            rows[entry.path] = []
            continue
        meaning = entry.text.replace("|", "\\|")
        row = f"| `{'.'.join(entry.path)}` | `{entry.value}` | {meaning} |"
        rows[entry.path[:-1]].append(row)
    lines = [HEAD]
    for path, text in about.items():
        title = f"`{'.'.join(path)}`" if path else "Top level"
        lines += [f"{'#' * max(2, len(path) + 1)} {title}", ""]
        lines += [_sentence(text), ""] if text else []
        if rows[path]:
            lines += ["| key | default | meaning |", "|---|---|---|", *rows[path], ""]
    return "\n".join(lines[:-1]) + "\n"


def _sentence(text: str) -> str:
    return text if text.endswith(".") else text + "."


def main() -> int:
    """Keeps docs/configuration.md."""
    return keep(OUT, page(to_yaml(GimbalConfig())), __doc__)


if __name__ == "__main__":
    sys.exit(main())
