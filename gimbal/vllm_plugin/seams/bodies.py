"""Digests of the bodies of vLLM's functions and classes, by version.

A signature says whether Gimbal's code can be called. A body says whether what it relies on is still
done there. A changed one is a reason to look, not a failure.
"""

from __future__ import annotations

import ast
import hashlib
import io
import json
import re
import tokenize
from collections.abc import Iterable
from functools import cache
from importlib import resources
from pathlib import Path

from gimbal.vllm_plugin.seams.check import find_symbol
from gimbal.vllm_plugin.seams.table import Seam

FILE = "bodies.json"
"""Version -> symbol -> digest; written by `scripts/compatibility.py`."""
_DIGITS = 12


def bodies(vllm_root: Path, seams: Iterable[Seam]) -> dict[str, str]:
    """Symbol (module and name) -> digest of its body, of those of `seams` that have one."""
    found = {}
    for seam in seams:
        place = find_symbol(vllm_root, seam)
        if place is None:
            continue
        node, source = place
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found[f"{seam.module}.{seam.symbol}"] = digest(source, node)
    return found


def digest(source: str, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> str:
    """Of the tokens of `node`: comments, docstrings and layout do not count."""
    lines = source.splitlines(keepends=True)
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    text = "".join(lines[first - 1 : node.end_lineno])
    documented = {
        (inner.body[0].lineno - first + 1)
        for inner in ast.walk(node)
        if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        and ast.get_docstring(inner, clean=False) is not None
    }
    # Of an indented piece only the indentation makes no sense.
    reader = io.StringIO("if 1:\n" + text if text[0].isspace() else text).readline
    shift = int(text[0].isspace())
    words = []
    for token in tokenize.generate_tokens(reader):
        docstring = token.type == tokenize.STRING and token.start[0] - shift in documented
        if token.type != tokenize.COMMENT and not docstring:
            words.append(token.string)
    joined = "".join("".join(words).split())
    return hashlib.sha256(joined.encode()).hexdigest()[:_DIGITS]


@cache
def known() -> dict[str, dict[str, str]]:
    """The digests of every version that was compared, oldest first."""
    text = resources.files(__package__).joinpath(FILE).read_text(encoding="utf-8")
    found: dict[str, dict[str, str]] = json.loads(text)
    return found


def compared_with(version: str | None) -> str:
    """The known version nearest to `version`, the newer of two; the newest where it is unknown."""
    newest_first = [*reversed(known())]
    if version is None:
        return newest_first[0]
    return min(newest_first, key=lambda one: abs(_minor(one) - _minor(version)))


def _minor(version: str) -> int:
    major, minor = (*map(int, re.findall(r"\d+", version)), 0, 0)[:2]
    return 1000 * major + minor


def changed(vllm_root: Path, seams: Iterable[Seam], version: str) -> list[str]:
    """Symbols below `vllm_root` whose bodies are not those of `version`."""
    then = known()[version]
    now = bodies(vllm_root, seams)
    return [symbol for symbol, body in now.items() if then.get(symbol, body) != body]
