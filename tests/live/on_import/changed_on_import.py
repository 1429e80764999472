"""Changes modules as they are imported: for a `sitecustomize` beside which this folder is in
PYTHONPATH, so that a server imports vLLM when and in the order that it always does."""

import sys
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

Change = Callable[[ModuleType], object]


class _Changed(Loader):
    """Runs a module's own loader, then `change`."""

    def __init__(self, loader: Any, change: Change) -> None:
        self.loader, self.change = loader, change

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        self.change(module)


class _Finder(MetaPathFinder):
    """Finds the modules to change, once each."""

    def __init__(self, changes: dict[str, Change]) -> None:
        self.changes = changes

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        change = self.changes.pop(name, None)
        if change is None:
            return None
        spec = find_spec(name)
        assert spec is not None
        spec.loader = _Changed(spec.loader, change)
        return spec


def change_on_import(changes: dict[str, Change]) -> None:
    """Has each module of `changes` changed by its function once it is imported."""
    sys.meta_path.insert(0, _Finder(dict(changes)))
