"""Counts the lines of Python in the wheel and fails where a file or a function is too long.

    python scripts/size_budget.py

The total is that of `gimbal/`. The limits hold in `gimbal/` and `reproduction/`: a file of at most
400 lines, a function of at most 60, docstrings and nested functions included. What is longer is
split, or stands in `ALLOWED` with the reason. An entry that is no longer needed fails as well.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WHEEL = "gimbal"
FOLDERS = (WHEEL, "reproduction")
FILE_LINES, FUNCTION_LINES = 400, 60

ALLOWED = {
    "gimbal/core/dispatch/policies/gimbal.py:_price": "compiled as one function, one line per term",
    "gimbal/sim/kernels.py:experts_us": "compiled as one function, a third of it shapes",
}
"""File, or file:function (`Class.method` for methods) -> why it may be longer."""


@dataclass(frozen=True, slots=True)
class Over:
    """Something longer than its limit.

    Attributes:
        name: path of the file, or path:function.
        lines: its length.
        limit: the most lines it may have.
    """

    name: str
    lines: int
    limit: int


def python_files(root: Path, folder: str) -> list[Path]:
    """Every Python file below `root`/`folder`, sorted."""
    return sorted((root / folder).rglob("*.py"))


def line_count(path: Path) -> int:
    """Lines of the file, comments and blank ones included."""
    return len(path.read_text(encoding="utf-8").splitlines())


def functions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, int]]:
    """(dotted name, lines from `def` to the end) of every function, nested ones too."""
    for node in ast.iter_child_nodes(tree):
        inner = prefix
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            inner = f"{prefix}{node.name}."
            if not isinstance(node, ast.ClassDef):
                assert node.end_lineno is not None
                yield prefix + node.name, node.end_lineno - node.lineno + 1
        yield from functions(node, inner)


def too_long(root: Path, folders: Iterable[str] = FOLDERS) -> list[Over]:
    """Everything below `root` that is longer than its limit, by path."""
    over = []
    for folder in folders:
        for path in python_files(root, folder):
            name = path.relative_to(root).as_posix()
            lines = line_count(path)
            if lines > FILE_LINES:
                over.append(Over(name, lines, FILE_LINES))
            tree = ast.parse(path.read_text(encoding="utf-8"))
            over += [
                Over(f"{name}:{function}", length, FUNCTION_LINES)
                for function, length in functions(tree)
                if length > FUNCTION_LINES
            ]
    return over


def problems(over: Iterable[Over], allowed: Mapping[str, str]) -> list[str]:
    """One line per thing that is too long and not allowed, and per entry that nothing needs."""
    over = list(over)
    lines = [
        f"{item.name}: {item.lines} lines, limit {item.limit}"
        for item in over
        if item.name not in allowed
    ]
    needed = {item.name for item in over}
    lines += [
        f"{name}: within its limit; delete it from ALLOWED" for name in allowed.keys() - needed
    ]
    return sorted(lines)


def main(root: Path = ROOT, allowed: Mapping[str, str] = ALLOWED) -> int:
    """Prints the total and who is over; returns the exit code."""
    files = python_files(root, WHEEL)
    print(f"{WHEEL}/: {sum(map(line_count, files)):,} lines of Python in {len(files)} files")
    over = too_long(root)
    for item in over:
        if item.name in allowed:
            print(f"allowed: {item.name}: {item.lines} lines ({allowed[item.name]})")
    found = problems(over, allowed)
    for line in found:
        print(f"error: {line}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
