"""The check: signatures compared by parsing vLLM's source, never by importing it.

So ``gimbal doctor --vllm-source`` can check a wheel that is not installed.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable
from dataclasses import dataclass
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
    trees: dict[Path, ast.Module] = {}
    for seam in seams:
        base = vllm_root.joinpath(*seam.module.split("."))
        path = base.with_suffix(".py") if base.with_suffix(".py").exists() else base / "__init__.py"
        if not path.exists():
            problems.append(SeamProblem(seam, f"no module {seam.module}"))
            continue
        if path not in trees:
            trees[path] = ast.parse(path.read_text(encoding="utf-8"))
        node = _find(trees[path], seam.symbol.split("."))
        if node is None and seam.since:
            continue
        if node is None:
            problems.append(SeamProblem(seam, "no such symbol"))
        elif seam.parameters:
            found = _parameters(node)
            if found != seam.parameters:
                problems.append(SeamProblem(seam, f"({', '.join(found)})"))
    return problems


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
