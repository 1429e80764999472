"""Whatever vLLM calls into stands in the table of seams with the entry that guards it."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import gimbal.vllm_plugin
from gimbal.vllm_plugin.seams import SEAMS

PLUGIN = Path(gimbal.vllm_plugin.__file__).parent
ENTRIES = {seam.entry for seam in SEAMS if seam.entry}
REPLACED = {seam.symbol for seam in SEAMS if seam.entry}
OWN = ("gimbal", "_gimbal")
"""Attributes that Gimbal adds to vLLM's objects begin with these; they replace nothing."""


def test_what_is_replaced_or_overridden_has_an_entry() -> None:
    words = ("overridden", "implemented", "subclassed")
    without = [
        f"{seam.module}.{seam.symbol} ({seam.level})"
        for seam in SEAMS
        if not seam.entry and (seam.patched or seam.why.startswith(words))
    ]
    assert not without


def names_of(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """(name, what of vLLM's it stands for) of imports, and of plain assignments from those."""
    known: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
            known |= {alias.asname or alias.name: alias.name for alias in node.names}
    # A class of a module, a shorter name for either, and a module that is imported by name.
    for node in ast.walk(tree):
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if not isinstance(node, ast.Assign | ast.AnnAssign) or not isinstance(target, ast.Name):
            continue
        value = node.value
        if isinstance(value, ast.Attribute) and isinstance(value.value, ast.Name):
            if value.value.id in known:
                known[target.id] = value.attr
        elif isinstance(value, ast.Call) and "vllm." in ast.unparse(value):
            known[target.id] = "module"
    yield from known.items()


def assigned(path: Path) -> Iterator[tuple[int, str, str]]:
    """(line, what of vLLM's, attribute) of every assignment onto it in the file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    known = dict(names_of(tree))
    for function in ast.walk(tree):  # a class that is handed in
        if isinstance(function, ast.FunctionDef):
            for argument in function.args.args:
                if argument.annotation is not None and ast.unparse(argument.annotation) == "type":
                    known.setdefault(argument.arg, "*")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id in known:
                yield node.lineno, known[node.value.id], node.attr
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("setattr", "_replace"):
            owner, name = node.args[:2]
            if isinstance(owner, ast.Name) and owner.id in known:
                yield node.lineno, known[owner.id], ast.unparse(name).strip("'")


def in_the_table(owner: str, name: str) -> bool:
    if name.startswith(OWN):
        return True
    if owner == "*":
        return any(symbol.endswith(f".{name}") for symbol in REPLACED)
    return f"{owner}.{name}" in REPLACED or name in REPLACED


OTHER_ROWS = {
    ("engine/refusals.py", "EngineCoreProc", "preprocess_add_request"): "inherited: EngineCore",
    ("dispatch/unsent.py", "DPLBAsyncMPClient", "add_request_async"): "inherited: DPAsyncMPClient",
    ("placement/hook.py", "EplbState", "policy"): "AbstractEplbPolicy.rebalance_experts",
}
"""(file, class, attribute) -> the row that tells of it."""


def test_nothing_else_of_vllm_is_assigned() -> None:
    found = 0
    missing = []
    for path in sorted(PLUGIN.rglob("*.py")):
        where = path.relative_to(PLUGIN).as_posix()
        for line, owner, name in assigned(path):
            found += 1
            if (where, owner, name) not in OTHER_ROWS and not in_the_table(owner, name):
                missing.append(f"{where}:{line} {owner}.{name}")
    assert not missing
    assert found > 20, "the search finds nothing any more"


def test_a_new_assignment_is_seen(tmp_path: Path) -> None:
    source = """
    from vllm.v1.core import pool as module
    from vllm.v1.engine import Engine as Core

    def patch(runner: type):
        Core.run = None
        module.limit = 3
        kind = module.Pool
        kind.take = None
        runner.warm_up = None
        setattr(Core, "stop", None)
        Core.gimbal_own = None
    """
    path = tmp_path / "hook.py"
    path.write_text(textwrap.dedent(source))
    found = {(owner, name) for _, owner, name in assigned(path)}
    assert found == {
        ("Engine", "run"),
        ("pool", "limit"),
        ("Pool", "take"),
        ("*", "warm_up"),
        ("Engine", "stop"),
        ("Engine", "gimbal_own"),
    }
    assert [one for one in found if in_the_table(*one)] == [("Engine", "gimbal_own")]


def modules() -> Iterator[ModuleType]:
    for info in pkgutil.walk_packages([str(PLUGIN)], "gimbal.vllm_plugin."):
        yield importlib.import_module(info.name)


def bases_of(found: type) -> list[type]:
    """The classes of vLLM whose methods `found` replaces by its own of the same name."""
    from vllm.distributed.eplb.policy import AbstractEplbPolicy
    from vllm.v1.core.sched.scheduler import Scheduler

    stands_before = {
        "GimbalSchedulerMixin": Scheduler,
        "GimbalQueueMixin": Scheduler,
        "Member": AbstractEplbPolicy,
    }
    if found.__name__ in stands_before:
        return [stands_before[found.__name__]]
    return [base for base in found.__mro__ if base.__module__.startswith("vllm.")]


@pytest.mark.slow
def test_every_overridden_method_has_its_row() -> None:
    pytest.importorskip("vllm")
    missing, found = [], 0
    for module in modules():
        for kind in vars(module).values():
            if not inspect.isclass(kind) or kind.__module__ != module.__name__:
                continue
            for name, method in vars(kind).items():
                if not inspect.isfunction(method):
                    continue
                if not any(hasattr(base, name) for base in bases_of(kind)):
                    continue
                found += 1
                entry = (
                    f"{module.__name__.removeprefix('gimbal.vllm_plugin.')}:{kind.__name__}.{name}"
                )
                if entry not in ENTRIES and entry not in CONSTRUCTORS:
                    missing.append(entry)
    assert not missing
    assert found > 20, "the search finds nothing any more"


CONSTRUCTORS = {
    "queue.waiting_queue:GimbalRequestQueue.__init__": "called by the level, guarded there",
    "placement.member:Member.__init__": "called by `attach`",
}
"""vLLM's abstract classes have constructors as every class has; it does not call these."""

INSTALLED = """
from importlib import import_module

from gimbal.vllm_plugin.install import install_all
from gimbal.vllm_plugin.seams import SEAMS

install_all()
from gimbal.vllm_plugin.cpu_backend.activation import activate
from gimbal.vllm_plugin.dispatch import user_session
from gimbal.vllm_plugin.placement.hook import MODEL_RUNNERS, patch_model_runner

activate(eplb=True)
user_session.install()
for name in MODEL_RUNNERS:
    patch_model_runner(import_module(name).GPUModelRunner)

ELSEWHERE = {
    "current_platform": "replaced while a configuration is built",
    "CPUModelRunner": "replaced while a worker is made",
    "Scheduler._reserve_prefill_lookahead": "of the scheduler at hand, for a step",
    "KVConnectorBase_V1.get_num_new_matched_tokens": "of the scheduler's connector",
    "DPAsyncMPClient.add_request_async": "on the class that dispatches, below",
    "EngineCore.preprocess_add_request": "on the class of an engine's process, below",
}
checked = 0
for seam in SEAMS:
    if not seam.patched or seam.symbol in ELSEWHERE:
        continue
    owner = import_module("vllm." + seam.module)
    *path, name = seam.symbol.split(".")
    for part in path:
        owner = getattr(owner, part)
    if seam.since and not hasattr(owner, name):
        continue
    found = getattr(owner, name)
    found = getattr(found, "__func__", found)
    module, _, entry = seam.entry.partition(":")
    # Wrapping copies a function's name; its code keeps its own.
    code = getattr(found, "__code__", None)
    where = type(found).__module__ if code is None else code.co_filename
    maker = type(found).__qualname__ if code is None else code.co_qualname
    # `EplbState.step` is replaced twice, by the level and by the CPU backend around it.
    wrapped = getattr(found, "__wrapped__", None)
    if maker.partition(".")[0] != entry and wrapped is not None:
        code = wrapped.__code__
        where, maker = code.co_filename, code.co_qualname
    assert maker.partition(".")[0] == entry.partition(".")[0], (seam, where, maker)
    assert module.replace(".", "/") in where.replace(".", "/"), (seam, where)
    checked += 1
from vllm.v1.engine.core_client import DPLBAsyncMPClient

assert DPLBAsyncMPClient.add_request_async.__code__.co_qualname.startswith("_followed.")
from vllm.v1.engine.core import EngineCoreProc

assert EngineCoreProc.preprocess_add_request.__code__.co_qualname.startswith("_read.")
print("checked", checked)
"""


@pytest.mark.slow
def test_vllm_calls_the_entries_of_the_table(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    script = tmp_path / "installed.py"
    script.write_text(INSTALLED)
    command = [sys.executable, str(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.rsplit("checked", 1)[1]) >= 25
