"""Compares the operators of vLLM's binaries with the calls in its Python files; prints JSON.

    python scripts/operators.py OTHER_VLLM

Run by `scripts/compat.py` where the Python files are of another version than the binaries.
OTHER_VLLM is the folder of the vLLM that the binaries were built with. An operator differs when a
call's arguments fit no overload that the binaries registered, though those of OTHER_VLLM do. A
missing operator is one that only these Python files call: most of them are for GPUs.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Argument:
    """One parameter of a registered operator."""

    name: str
    required: bool
    keyword_only: bool


@dataclass(frozen=True, slots=True)
class Call:
    """One call in the Python files; `positional` is None where arguments are unpacked.

    `keywords` is None where the operator is only named.
    """

    operator: str
    positional: int | None
    keywords: tuple[str, ...] | None
    place: str


def calls(root: Path) -> Iterator[Call]:
    """Every use of ``torch.ops.NAMESPACE.NAME`` below `root`."""
    for path in sorted(root.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if "torch.ops" not in text:
            continue
        place = path.relative_to(root).as_posix()
        seen = set()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and (name := _operator(node.func)):
                seen.add(name)
                unpacked = any(isinstance(value, ast.Starred) for value in node.args)
                keywords = tuple(keyword.arg or "**" for keyword in node.keywords)
                positional = None if unpacked or "**" in keywords else len(node.args)
                yield Call(name, positional, keywords, f"{place}:{node.lineno}")
            elif isinstance(node, ast.Attribute) and (name := _operator(node)) and name not in seen:
                yield Call(name, None, None, f"{place}:{node.lineno}")


def _operator(node: ast.AST) -> str:
    """``NAMESPACE::NAME`` where `node` is ``torch.ops.NAMESPACE.NAME``, with an overload or not."""
    words: list[str] = []
    while isinstance(node, ast.Attribute):
        words.append(node.attr)
        node = node.value
    words.append(node.id if isinstance(node, ast.Name) else "")
    words.reverse()
    if words[:2] != ["torch", "ops"] or len(words) not in (4, 5):
        return ""
    return f"{words[2]}::{words[3]}"


def fits(call: Call, overload: list[Argument]) -> bool:
    """Whether the arguments of `call` are those of `overload`."""
    if call.keywords is None:
        return True
    named = [keyword for keyword in call.keywords if keyword != "**"]
    names = [argument.name for argument in overload]
    if not set(named) <= set(names):
        return False
    if call.positional is None:
        return True
    by_place = [argument for argument in overload if not argument.keyword_only]
    given = {argument.name for argument in by_place[: call.positional]} | set(named)
    missing = [a.name for a in overload if a.required and a.name not in given]
    return call.positional <= len(by_place) and not missing


def registered() -> dict[str, list[list[Argument]]]:
    """The overloads of every operator that loading vLLM's binaries registers."""
    import torch
    from vllm.platforms import current_platform

    before = {str(schema) for schema in torch._C._jit_get_all_schemas()}
    current_platform.import_kernels()
    found: dict[str, list[list[Argument]]] = {}
    for schema in torch._C._jit_get_all_schemas():
        if str(schema) not in before:
            arguments = [
                Argument(a.name, not a.has_default_value(), a.kwarg_only) for a in schema.arguments
            ]
            found.setdefault(schema.name, []).append(arguments)
    return found


def compare(
    operators: dict[str, list[list[Argument]]], ours: list[Call], other: list[Call]
) -> dict[str, Any]:
    """What `ours` calls, against `operators` and against `other`, the binaries' own Python."""
    namespaces = {name.partition("::")[0] for name in operators}
    used = [call for call in ours if call.operator.partition("::")[0] in namespaces]
    misfits = {call.operator for call in other if not _fits_any(call, operators)}
    differing = [
        f"`{call.operator}` ({call.place})"
        for call in used
        if not _fits_any(call, operators) and call.operator not in misfits
    ]
    missing = {c.operator for c in used if c.operator not in operators}
    return {
        "registered": len(operators),
        "compared": len({call.operator for call in used} & operators.keys()),
        "differing": sorted(differing),
        "missing": sorted(missing - {call.operator for call in other}),
    }


def _fits_any(call: Call, operators: dict[str, list[list[Argument]]]) -> bool:
    overloads = operators.get(call.operator)
    return overloads is None or any(fits(call, overload) for overload in overloads)


def main() -> None:
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    root = Path(spec.submodule_search_locations[0])
    print(json.dumps(compare(registered(), list(calls(root)), list(calls(Path(sys.argv[1]))))))


if __name__ == "__main__":
    main()
