"""Folders for what can be made again: compiled code, the demo model.

In a container often neither the package nor a home can be written. Then a private folder below the
temporary ones, or in memory, takes their place; it lasts as long as those do.
"""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import gimbal

COMPILED = "NUMBA_CACHE_DIR"
"""Environment variable: where numba keeps what it compiled."""
MEMORY = Path("/dev/shm")


ROOM_BYTES = 4 << 20
"""What all our compiled code takes; a folder with less is as good as none."""


def is_writable(folder: Path) -> bool:
    """Whether files can be made in `folder`, which is made where it is missing, with some room."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            return file.write(bytes(ROOM_BYTES)) == ROOM_BYTES
    except OSError:
        return False


def user_cache() -> Path | None:
    """The user's cache folder, None for a user without a home."""
    if folder := os.environ.get("XDG_CACHE_HOME"):
        return Path(folder)
    with contextlib.suppress(RuntimeError):
        return Path.home() / ".cache"
    return None


def lasting_folders() -> Iterator[Path]:
    """Where numba looks for a folder to write, in its order, but for one given by `COMPILED`."""
    yield Path(gimbal.__file__).parent / "core" / "placement" / "__pycache__"
    if cache := user_cache():
        yield cache / "numba"


def temporary_folder() -> Path | None:
    """Where temporary files can be made: the system's folder, or memory; None for nowhere."""
    with contextlib.suppress(FileNotFoundError):
        return Path(tempfile.gettempdir())
    return MEMORY if MEMORY.is_dir() and is_writable(MEMORY) else None


def private_folder() -> Path | None:
    """A folder of this user's own among the temporary ones, the same for all its processes.

    Code is loaded from it, so one that others could write to is left alone.
    """
    folder = _private_path()
    if folder is None:
        return None
    with contextlib.suppress(OSError):
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        found = folder.lstat()
        private = stat.S_ISDIR(found.st_mode) and found.st_mode & 0o077 == 0
        if private and found.st_uid == os.getuid() and is_writable(folder):
            return folder
    return None


def _private_path() -> Path | None:
    base = temporary_folder()
    return None if base is None else base / f"gimbal-cache-{os.getuid()}"


def compiled_code() -> tuple[Path | None, bool]:
    """Where compiled code is kept, None where nothing can be written; whether it lasts."""
    given = os.environ.get(COMPILED)
    for folder in (*([Path(given)] if given else []), *lasting_folders()):
        if is_writable(folder):
            return folder, folder != _private_path()
    return private_folder(), False


def keep_compiled_code() -> bool:
    """Has this process and its children keep compiled code where they can; False for nowhere."""
    folder, lasts = compiled_code()
    if folder is not None and not lasts:
        os.environ[COMPILED] = str(folder)
    return folder is not None
