"""The check: signatures compared by parsing vLLM's source, never by importing it.

So ``gimbal doctor --vllm-source`` can check a wheel that is not installed.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from gimbal.vllm_plugin.seams.table import Seam


@dataclass(frozen=True, slots=True)
class SeamProblem:
    """A seam that does not look as expected in one vLLM source tree."""

    seam: Seam
    found: str


def check_seams(vllm_root: Path, seams: Iterable[Seam]) -> list[SeamProblem]:
    """Compares `seams` with the sources below `vllm_root` (the folder that holds ``v1/``)."""
    problems = []
    for seam in seams:
        if not _file_of(vllm_root, seam.module).exists():
            problems.append(SeamProblem(seam, f"no module {seam.module}"))
            continue
        place = find_symbol(vllm_root, seam)
        if place is None and seam.since:
            continue
        if place is None:
            problems.append(SeamProblem(seam, "no such symbol"))
        elif seam.parameters:
            found = _parameters(place[0])
            if found not in (seam.parameters, *seam.also):
                problems.append(SeamProblem(seam, f"({', '.join(found)})"))
    return problems


def find_symbol(vllm_root: Path, seam: Seam) -> tuple[ast.AST, str] | None:
    """What defines the symbol of `seam` below `vllm_root`, and the source of its module."""
    path = _file_of(vllm_root, seam.module)
    if not path.exists():
        return None
    tree, source = _parsed(path, path.stat().st_mtime_ns)
    node = _find(tree, seam.symbol.split("."))
    return None if node is None else (node, source)


def _file_of(vllm_root: Path, module: str) -> Path:
    base = vllm_root.joinpath(*module.split("."))
    path = base.with_suffix(".py")
    return path if path.exists() else base / "__init__.py"


@lru_cache(maxsize=64)
def _parsed(path: Path, changed_ns: int) -> tuple[ast.Module, str]:
    del changed_ns  # a file that was written again is read again
    source = path.read_text(encoding="utf-8")
    return ast.parse(source), source


def _find(node: ast.AST, path: list[str]) -> ast.AST | None:
    """The definition, assignment or import named by `path`, directly below `node` or in if/try."""
    for child in ast.iter_child_nodes(node):
        name = getattr(child, "name", None)
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            if name == path[0]:
                return child if len(path) == 1 else _find(child, path[1:])
        elif isinstance(child, ast.Assign | ast.AnnAssign):
            targets = child.targets if isinstance(child, ast.Assign) else [child.target]
            if len(path) == 1 and any(isinstance(t, ast.Name) and t.id == path[0] for t in targets):
                return child
        elif isinstance(child, ast.Import | ast.ImportFrom):
            if len(path) == 1 and any((a.asname or a.name) == path[0] for a in child.names):
                return child
        elif isinstance(child, ast.If | ast.Try) and (found := _find(child, path)) is not None:
            return found
    return None


def _parameters(node: ast.AST) -> tuple[str, ...]:
    """Parameter names of a function, with ``*args``, ``*`` and ``**kwargs`` marks."""
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return ("<not a function>",)
    args = node.args
    names = [a.arg for a in (*args.posonlyargs, *args.args)]
    if args.vararg is not None:
        names.append(f"*{args.vararg.arg}")
    elif args.kwonlyargs:
        names.append("*")
    names += [a.arg for a in args.kwonlyargs]
    if args.kwarg is not None:
        names.append(f"**{args.kwarg.arg}")
    return tuple(names)
