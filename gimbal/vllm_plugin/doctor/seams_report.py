"""Every vLLM symbol Gimbal relies on, compared with a source tree."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from gimbal.core.config import LEVELS
from gimbal.core.errors import InputError
from gimbal.core.files import read_text
from gimbal.vllm_plugin.doctor.findings import Finding
from gimbal.vllm_plugin.seams import SEAMS, bodies, check_seams
from gimbal.vllm_plugin.versions import check_version, supported_text


def source_root(folder: Path) -> Path:
    """The folder that holds ``v1/``: `folder` itself or its ``vllm``.

    Raises InputError when neither does.
    """
    for root in (folder, folder / "vllm"):
        if (root / "v1").is_dir() and (root / "__init__.py").exists():
            return root
    raise InputError(f"{folder}: no vLLM sources (expected {folder}/vllm/v1 or {folder}/v1)")


def source_version(root: Path) -> str | None:
    """vLLM's version as written in its ``_version.py``, None when there is none."""
    path = root / "_version.py"
    if not path.exists():
        return None
    match = re.search(r"^__version__ = .*?'([^'\n]+)'", read_text(path), re.MULTILINE)
    return match[1] if match else None


def check_source_version(root: Path) -> Finding:
    version = source_version(root)
    if version is None:
        return Finding("vLLM sources", "warning", f"{root}, version unknown")
    try:
        check_version(version)
    except InputError:
        return Finding("vLLM sources", "failed", version, f"install vLLM {supported_text('or')}")
    return Finding("vLLM sources", "ok", version)


def check_levels(root: Path) -> Iterator[Finding]:
    """One finding per level: how many symbols are as expected, or what differs."""
    problems = check_seams(root, SEAMS)
    for level, count in Counter(seam.level for seam in SEAMS).items():
        bad = [problem for problem in problems if problem.seam.level == level]
        if not bad:
            yield Finding(f"symbols of {level}", "ok", f"all {count} as expected")
            continue
        for problem in bad:
            seam = problem.seam
            wanted = f"({', '.join(seam.parameters)})" if seam.parameters else "to exist"
            switch = "switch the level off (--levels), or " if level in LEVELS else ""
            use = f"replaced: {seam.why}" if seam.patched else seam.why
            yield Finding(
                f"symbols of {level}",
                "failed",
                f"vllm.{seam.module}.{seam.symbol}: {problem.found}; expected {wanted}",
                f"{switch}use vLLM {supported_text('or')} (what Gimbal does with it: {use})",
            )


def check_bodies(root: Path) -> Finding:
    """Whether what stands in those symbols is what was tested; where not, somebody should look."""
    then = bodies.compared_with(source_version(root))
    count = len(bodies.bodies(root, SEAMS))
    changed = bodies.changed(root, SEAMS, then)
    if not changed:
        return Finding("bodies", "ok", f"all {count} as in {then}")
    return Finding(
        "bodies",
        "warning",
        f"{len(changed)} of {count} are not those of {then}: {', '.join(changed)}",
        f"look at what changed there; Gimbal was tested on {then}",
    )
