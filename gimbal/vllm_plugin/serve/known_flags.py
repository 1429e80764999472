"""Flags that the installed vLLM knows, read from its source: its own parser takes 20 s to import.

They are the ``--words`` in the modules that add them, and the fields of its argument classes.
"""

from __future__ import annotations

import ast
import difflib
import re
from collections.abc import Iterable
from importlib import util
from pathlib import Path

from gimbal.core.errors import InputError
from gimbal.vllm_plugin.versions import opposite_flags, read_text

OWN = ("--demo", "--demo-dir", "--levels", "--gimbal-config", "--verbose", "--dry-run")
"""Flags of ``gimbal serve`` itself, which a misspelt one may mean."""
ALIKE = 0.75
"""How near a known flag an unknown one must be to be refused here; others are left to vLLM."""
FEWEST = 100
"""Fewer flags than these and the source is not what it was: nothing is refused."""


def check_flags(given: Iterable[str]) -> None:
    """Raises InputError for a flag that vLLM has not and that looks like one it has.

    Args:
        given: long flags in vLLM's spelling, ``--dotted.key`` ones included.
    """
    spec = util.find_spec("vllm")
    known = known_flags(Path(spec.origin).parent) if spec is not None and spec.origin else set()
    if len(known) < FEWEST:
        return
    for flag in sorted(given):
        name = flag.partition(".")[0]
        # argparse takes any unambiguous beginning of a flag.
        if any(whole.startswith((name, name.replace("--no-", "--", 1))) for whole in known):
            continue
        meant = difflib.get_close_matches(name, [*known, *OWN], n=1, cutoff=ALIKE)
        if meant:
            raise InputError(f"{name}: vLLM has no such flag (did you mean {meant[0]!r}?)")


def known_flags(root: Path) -> set[str]:
    """Long flags of ``vllm serve`` in vLLM's source below `root`; empty when it cannot be read."""
    files = [root / "engine" / "arg_utils.py", *(root / "entrypoints").rglob("cli_args.py")]
    found: set[str] = set()
    for file in files:
        try:
            tree = ast.parse(read_text(file))
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                if re.fullmatch(r"--[a-z][a-z0-9_-]*", node.value):
                    found.add(node.value.replace("_", "-"))
            elif isinstance(node, ast.ClassDef) and node.name.endswith("Args"):
                fields = [s.target for s in node.body if isinstance(s, ast.AnnAssign)]
                names = [field.id for field in fields if isinstance(field, ast.Name)]
                found |= {"--" + name.replace("_", "-") for name in names}
    return found | opposite_flags(root, found)
