"""Every vLLM symbol Gimbal patches, subclasses or calls into, with the signature it expects.

The one list that says what a new vLLM version can break. Signatures are compared by parsing
vLLM's source, never by importing it, so that ``gimbal doctor --vllm-source`` can check a wheel
that is not installed.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Seam:
    """One symbol of vLLM.

    Attributes:
        module: dotted module below ``vllm``, for example ``v1.engine.core_client``.
        symbol: qualified name inside the module, for example ``DPLBAsyncMPClient.__init__``.
        parameters: parameter names in order, ``*`` marks as in a signature; empty for a class or
            a module-level name, where only existence is checked.
        level: the Gimbal level (or ``cpu_backend``) that stops working without it.
        why: what Gimbal does with it.
        patched: True when Gimbal replaces it, False when it only calls or subclasses it.
    """

    module: str
    symbol: str
    parameters: tuple[str, ...]
    level: str
    why: str
    patched: bool = True


SEAMS: tuple[Seam, ...] = ()


@dataclass(frozen=True, slots=True)
class SeamProblem:
    """A seam that does not look as expected in one vLLM source tree."""

    seam: Seam
    found: str


def check_seams(vllm_root: Path, seams: tuple[Seam, ...] | None = None) -> list[SeamProblem]:
    """Compares `seams` with the sources below `vllm_root` (the folder that holds ``v1/``)."""
    problems = []
    trees: dict[Path, ast.Module] = {}
    for seam in SEAMS if seams is None else seams:
        base = vllm_root.joinpath(*seam.module.split("."))
        path = base.with_suffix(".py") if base.with_suffix(".py").exists() else base / "__init__.py"
        if not path.exists():
            problems.append(SeamProblem(seam, f"no module {seam.module}"))
            continue
        if path not in trees:
            trees[path] = ast.parse(path.read_text(encoding="utf-8"))
        node = _find(trees[path], seam.symbol.split("."))
        if node is None:
            problems.append(SeamProblem(seam, "no such symbol"))
        elif seam.parameters:
            found = _parameters(node)
            if found != seam.parameters:
                problems.append(SeamProblem(seam, f"({', '.join(found)})"))
    return problems


def _find(node: ast.AST, path: list[str]) -> ast.AST | None:
    """The definition or assignment named by `path` directly below `node` (also inside if/try)."""
    for child in ast.iter_child_nodes(node):
        name = getattr(child, "name", None)
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            if name == path[0]:
                return child if len(path) == 1 else _find(child, path[1:])
        elif isinstance(child, ast.Assign | ast.AnnAssign):
            targets = child.targets if isinstance(child, ast.Assign) else [child.target]
            if len(path) == 1 and any(isinstance(t, ast.Name) and t.id == path[0] for t in targets):
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
