"""Results in files: computed once, then read back, whatever has stopped the run between."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gimbal.core.files import write_whole, writing
from gimbal.core.json_text import read_object, to_json
from gimbal.sim.capacity import code_digest


def digest(definition: Mapping[str, Any]) -> str:
    """Of everything that a result depends on: part of its file's name."""
    text = json.dumps(definition, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def kept(path: Path, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `compute` gives and the version of the code (`code`), or what `path` holds of earlier.

    A run may be stopped at any moment: see `write_whole`.
    """
    if path.exists():
        return read_object(path)
    text = to_json(compute() | {"code": code_digest()})
    with writing(path):
        write_whole(path, text)
    written: dict[str, Any] = json.loads(text)  # as it is read back: keys have become text
    return written
