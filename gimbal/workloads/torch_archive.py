"""Tensors of a ``torch.save`` file as numpy arrays, without torch and without running its pickle.

A ``.pt`` file is a zip archive: a pickle that describes objects, and the raw storages beside it.
Only the handful of names that describe tensors and plain containers are resolved; anything else
in the pickle is refused, so that a file from elsewhere cannot run code.
"""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from gimbal.core.errors import InputError

_DTYPES = {
    "FloatStorage": "<f4",
    "DoubleStorage": "<f8",
    "HalfStorage": "<f2",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "i1",
    "ByteStorage": "u1",
    "BoolStorage": "?",
}


def load_tensors(path: Path) -> Any:
    """The saved object, every tensor in it a numpy array; raises InputError for anything else."""
    try:
        with zipfile.ZipFile(path) as archive:
            pickled = next((n for n in archive.namelist() if n.endswith("/data.pkl")), None)
            if pickled is None:
                raise InputError(f"{path}: not a file of torch.save")
            with archive.open(pickled) as file:
                return _Reader(file, archive, pickled.removesuffix("data.pkl"), path).load()
    except (zipfile.BadZipFile, pickle.UnpicklingError, EOFError) as error:
        raise InputError(f"{path}: not a file of torch.save ({error})") from None


class _Reader(pickle.Unpickler):
    """Resolves tensors only."""

    def __init__(self, file: Any, archive: zipfile.ZipFile, prefix: str, path: Path) -> None:
        super().__init__(file)
        self._archive, self._prefix, self._path = archive, prefix, path

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _tensor
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        raise InputError(f"{self._path}: refuses to load {module}.{name}")

    def persistent_load(self, pid: Any) -> np.ndarray:
        kind, dtype, key, _device, _size = pid
        if kind != "storage":
            raise InputError(f"{self._path}: unknown reference {kind!r}")
        return np.frombuffer(self._archive.read(f"{self._prefix}data/{key}"), dtype=dtype)


def _tensor(storage: np.ndarray, offset: int, size: Any, stride: Any, *_rest: Any) -> np.ndarray:
    item = storage.itemsize
    view = np.lib.stride_tricks.as_strided(
        storage[offset:], tuple(size), tuple(s * item for s in stride), writeable=False
    )
    return view.copy()
