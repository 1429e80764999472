"""Arrays from numpy's files, whatever those hold: an array or an error of one line."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from gimbal.core.errors import InputError, with_type
from gimbal.core.files import reading, require_file

MOST_BYTES = 1 << 32
"""Of all arrays of a file once unpacked: a compressed one of a megabyte can hold a terabyte."""

Result = TypeVar("Result")


def kind_of(path: Path) -> str:
    """``npz``, ``npy`` or ``torch`` by what the file holds; raises InputError for anything else."""
    return guarded(path, lambda: _kind(path))


def _kind(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(6)
    if start == b"\x93NUMPY":
        return "npy"
    if not start.startswith(b"PK"):
        what = "a file of numpy (.npz, .npy) or of torch.save (.pt)"
        raise InputError(f"{path}: cannot be read: {'' if start else 'empty, '}expected {what}")
    check_archive(path)
    with zipfile.ZipFile(path) as archive:
        pickled = any(name.endswith("/data.pkl") for name in archive.namelist())
    return "torch" if pickled else "npz"


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """Every array of an ``.npz`` file; raises InputError that names the file."""
    return guarded(path, lambda: _npz(path))


def read_npy(path: Path) -> np.ndarray:
    """The array of an ``.npy`` file; raises InputError that names the file."""
    return guarded(path, lambda: _npy(path))


def guarded(path: Path, read: Callable[[], Result]) -> Result:
    """What `read` returns; raises InputError that names `path`, whatever goes wrong in it.

    Parsers of binary formats check little: what they raise for a damaged file is any exception.
    """
    require_file(path, path)
    try:
        with reading(path):
            return read()
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{path}: cannot be read: {with_type(error)}") from None


def _npz(path: Path) -> dict[str, np.ndarray]:
    check_archive(path)
    with np.load(path, allow_pickle=False) as data:
        arrays: dict[str, Any] = {name: data[name] for name in data.files}
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray):  # its bytes, where they begin as no array does
            raise InputError(f"{path}: {name}: no array")
    return arrays


def _npy(path: Path) -> np.ndarray:
    array: Any = np.load(path, mmap_mode="r", allow_pickle=False)  # claims no memory by its header
    if not isinstance(array, np.ndarray):
        raise InputError(f"{path}: cannot be read: no .npy file")
    return np.array(array)


def check_archive(path: Path) -> None:
    """Raises InputError unless `path` is a zip archive of bounded size."""
    if not zipfile.is_zipfile(path):
        raise InputError(f"{path}: cannot be read: no zip archive, or not all of one")
    with zipfile.ZipFile(path) as archive:
        size = sum(entry.file_size for entry in archive.infolist())
    if size > MOST_BYTES:
        raise InputError(f"{path}: {size} bytes once unpacked, more than {MOST_BYTES}")
