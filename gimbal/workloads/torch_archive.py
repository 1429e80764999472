"""Tensors of a ``torch.save`` file as numpy arrays, without torch and without running its pickle.

A ``.pt`` file is a zip archive: a pickle that describes objects, and the raw storages beside it.
Only the handful of names that describe tensors and plain containers are resolved; anything else
in the pickle is refused, so that a file from elsewhere cannot run code.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from gimbal.core.errors import InputError
from gimbal.workloads.arrays import MOST_BYTES, check_archive, guarded

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
    return guarded(path, lambda: _load(path))


def _load(path: Path) -> Any:
    check_archive(path)
    with zipfile.ZipFile(path) as archive:
        name = next((n for n in archive.namelist() if n.endswith("/data.pkl")), None)
        if name is None:
            raise InputError(f"{path}: not a file of torch.save")
        pickled = archive.read(name)
        _check_memo(pickled, path)
        return _Reader(pickled, archive, name.removesuffix("data.pkl"), path).load()


def _check_memo(pickled: bytes, path: Path) -> None:
    """A memo of 2**32 places is one instruction and 32 GiB; an honest one has one per object."""
    for code, place, _ in pickletools.genops(pickled):
        if code.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(place or 0) > len(pickled):
            raise InputError(f"{path}: not a file of torch.save (object {place})")


class _Reader(pickle.Unpickler):
    """Resolves tensors only."""

    def __init__(self, pickled: bytes, archive: zipfile.ZipFile, prefix: str, path: Path) -> None:
        super().__init__(io.BytesIO(pickled))
        self._archive, self._prefix, self._path = archive, prefix, path
        self._bytes = 0

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self._tensor
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

    def _tensor(
        self, storage: np.ndarray, offset: int, size: Any, stride: Any, *_rest: Any
    ) -> np.ndarray:
        """A view would read whatever memory the file names, so that bounds come first."""
        size, stride = tuple(map(int, size)), tuple(map(int, stride))
        if not isinstance(storage, np.ndarray) or len(size) != len(stride):
            raise InputError(f"{self._path}: a tensor without a storage or with a wrong shape")
        if offset < 0 or min((*size, *stride), default=0) < 0:
            raise InputError(f"{self._path}: a tensor of negative size")
        count, item = int(np.prod(size, dtype=object)), storage.itemsize
        last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
        self._bytes += count * item  # strides of 0 repeat one value
        if (count and last >= len(storage)) or self._bytes > MOST_BYTES:
            raise InputError(f"{self._path}: a tensor beyond its storage")
        if not count:
            return np.zeros(size, dtype=storage.dtype)
        view = np.lib.stride_tricks.as_strided(
            storage[offset:], size, tuple(s * item for s in stride), writeable=False
        )
        return view.copy()
