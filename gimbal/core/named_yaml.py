"""YAML files that a user names or points at: packaged ones by name, others by path."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

from gimbal.core.errors import InputError, nearest
from gimbal.core.yaml_reader import parse_yaml, read_yaml

SUFFIXES = {".yaml", ".yml"}
"""Of a file; anything else is a name, or a file where there is none of that name."""


def packaged_names(package: str, folder: str) -> list[str]:
    """Names of the YAML files in `folder` of `package`, sorted."""
    files = resources.files(package).joinpath(folder).iterdir()
    return sorted(f.name.removesuffix(".yaml") for f in files if f.name.endswith(".yaml"))


def read_named_yaml(kind: str, package: str, folder: str, name_or_path: str | Path) -> Any:
    """What the file holds; raises InputError calling it a `kind` for none, or a malformed one."""
    path, name = Path(name_or_path), str(name_or_path)
    names = packaged_names(package, folder)
    # As `gimbal calibrate --out profile.json` writes it.
    is_file = name not in names and path.is_file()
    if is_file or path.suffix in SUFFIXES:
        return read_yaml(path, f"{kind} {path}")
    if name not in names:
        raise InputError(f"unknown {kind} {name!r}{nearest(name, names)}")
    packaged = resources.files(package).joinpath(folder, f"{name}.yaml")
    return parse_yaml(packaged.read_text(encoding="utf-8"), f"{kind} {name}")
