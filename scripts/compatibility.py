"""Writes the table of docs/compatibility.md: every vLLM symbol Gimbal relies on, in each tree.

    .venv/bin/python -m scripts.compatibility [UNPACKED_WHEEL ...]

The installed vLLM comes first, and the others are compared with it. A tree is read without being
imported, so a wheel needs only to be unpacked. What the symbols' bodies are in the supported
versions among them is noted for `gimbal doctor`, in `gimbal/vllm_plugin/seams/bodies.json`.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

from gimbal.vllm_plugin import seams, versions
from gimbal.vllm_plugin.doctor.seams_report import source_root, source_version
from gimbal.vllm_plugin.doctor.software import vllm_root
from gimbal.vllm_plugin.seams import SEAMS, bodies, check_seams
from scripts.pages import put

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "compatibility.md"
BODIES = Path(seams.__file__).parent / bodies.FILE


def note_bodies(roots: dict[str, Path]) -> None:
    """Adds the bodies of the supported versions among `roots` to what `gimbal doctor` knows."""
    known = json.loads(BODIES.read_text()) if BODIES.exists() else {}
    known |= {
        v: bodies.bodies(root, SEAMS) for v, root in roots.items() if versions.is_supported(v)
    }
    text = json.dumps(dict(sorted(known.items())), indent=1, sort_keys=False)
    BODIES.write_text(text + "\n")


def table(roots: dict[str, Path]) -> str:
    """One row per symbol, one column per tree."""
    first = next(iter(roots))
    problems = [{id(p.seam): p.found for p in check_seams(root, SEAMS)} for root in roots.values()]
    found = {version: bodies.bodies(root, SEAMS) for version, root in roots.items()}
    counts = [
        sum(body != found[first].get(name, body) for name, body in bodies_of.items())
        for bodies_of in found.values()
    ]
    head = f"| vLLM | symbols | differ | bodies | not those of {first} |"
    lines = ["## Symbols by version", "", head, "|---|---|---|---|---|"]
    for version, differ, changed in zip(roots, problems, counts, strict=True):
        lines.append(
            f"| {version} | {len(SEAMS)} | {len(differ)} | {len(found[version])} | {changed} |"
        )
    by_level = defaultdict(list)
    for seam in SEAMS:
        by_level[seam.level].append(seam)
    for level, rows in by_level.items():
        lines += ["", f"### {level}", "", f"| symbol | use | {' | '.join(roots)} |"]
        lines.append("|---|---|" + "---|" * len(roots))
        for seam in rows:
            name = f"{seam.module}.{seam.symbol}"
            use = ("replaced: " if seam.patched else "") + seam.why
            use += f" (since {seam.since})" if seam.since else ""
            cells = []
            for version, differ in zip(roots, problems, strict=True):
                body = found[version].get(name)
                same = body == found[first].get(name, body)
                cells.append(differ.get(id(seam), "as expected" + ("" if same else "; look here")))
            lines.append(f"| `{name}` | {use} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trees", nargs="*", type=Path, help="unpacked vLLM wheels")
    installed = vllm_root()
    places = [installed] if installed is not None else []
    places += [source_root(folder) for folder in parser.parse_args().trees]
    roots = {source_version(root) or root.name: root for root in places}
    note_bodies(roots)
    PAGE.write_text(put(PAGE.read_text(), "symbols", table(roots)))


if __name__ == "__main__":
    main()
