"""Prints what CHANGELOG.md says of the version in `gimbal/__init__.py`, for the page of a release.

    python -m scripts.release_notes [VERSION]

Exit code 2 where the version has no section, or is marked as unreleased.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from gimbal import __version__

CHANGELOG = Path(__file__).resolve().parent.parent / "CHANGELOG.md"


def notes(text: str, version: str) -> str:
    """The section of `version`; raises ValueError where there is none that is released."""
    sections = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    for section in sections:
        heading, _, body = section.partition("\n")
        name, _, state = heading.partition(" ")
        if name == version and state.strip() == "(unreleased)":
            raise ValueError(f"{version} is not released: give it a date in CHANGELOG.md")
        if name == version:
            return body.strip() + "\n"
    raise ValueError(f"CHANGELOG.md has no section {version}")


def main(arguments: list[str]) -> int:
    """Prints; returns the exit code."""
    try:
        text = notes(CHANGELOG.read_text("utf-8"), arguments[0] if arguments else __version__)
    except ValueError as error:
        print(f"release notes: {error}", file=sys.stderr)
        return 2
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
