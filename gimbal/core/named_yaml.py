"""YAML files that a user names or points at: packaged ones by name, others by path."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from gimbal.core.errors import InputError, nearest

_SUFFIXES = {".yaml", ".yml"}


def packaged_names(package: str, folder: str) -> list[str]:
    """Names of the YAML files in `folder` of `package`, sorted."""
    files = resources.files(package).joinpath(folder).iterdir()
    return sorted(f.name.removesuffix(".yaml") for f in files if f.name.endswith(".yaml"))


def read_named_yaml(kind: str, package: str, folder: str, name_or_path: str | Path) -> Any:
    """What the file holds; raises InputError calling it a `kind` when there is none."""
    path, name = Path(name_or_path), str(name_or_path)
    if path.suffix in _SUFFIXES:
        if not path.exists():
            raise InputError(f"{kind} {path}: no such file")
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    names = packaged_names(package, folder)
    if name not in names:
        raise InputError(f"unknown {kind} {name!r}{nearest(name, names)}")
    packaged = resources.files(package).joinpath(folder, f"{name}.yaml")
    return yaml.safe_load(packaged.read_text(encoding="utf-8"))
