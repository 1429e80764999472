"""Files that a user names: what goes wrong with one becomes an error of one line that names it."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gimbal.core.errors import InputError, with_type

MOST_BYTES = 1 << 32
"""Of a text file: what is longer would fill the memory of many machines."""

_LINE = re.compile(r"[^\n]*\n|[^\n]+")


@contextmanager
def reading(name: str | Path) -> Iterator[None]:
    """Raises InputError that begins with `name` for a file that cannot be read, or as text."""
    with _named(name, "read"):
        yield


@contextmanager
def writing(name: str | Path) -> Iterator[None]:
    """Raises InputError that begins with `name` for a file or folder that cannot be written."""
    with _named(name, "written"):
        yield


@contextmanager
def _named(name: str | Path, verb: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        # Of a file that is to be written it is the folder that is missing.
        reason = "no such file" if verb == "read" else f"cannot be {verb}: {error.strerror}"
        raise InputError(f"{name}: {reason}") from None
    except OSError as error:
        raise InputError(f"{name}: cannot be {verb}: {error.strerror or error}") from None
    except UnicodeError:
        raise InputError(f"{name}: cannot be {verb}: not UTF-8 text") from None


@contextmanager
def structured(name: str | Path) -> Iterator[None]:
    """Raises InputError that begins with `name` where its content is not made as the block takes
    it to be: for documents of other programs, which no schema of ours describes."""
    try:
        yield
    except InputError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise InputError(f"{name}: not what is expected there ({with_type(error)})") from None


def is_unicode(text: str) -> bool:
    """Whether UTF-8 can hold `text`: half a surrogate pair it cannot."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_text(path: Path, name: str | Path | None = None, most_bytes: int = MOST_BYTES) -> str:
    """The text of a file (UTF-8, a byte order mark is dropped).

    Args:
        name: what complaints call it; None is its path.
        most_bytes: a longer file is refused.

    Raises InputError for a folder, a device, and for what is no text.
    """
    name = path if name is None else name
    with reading(name):
        require_file(path, name)
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size  # of a pipe it is 0
            content = b"" if size > most_bytes else file.read(most_bytes + 1)
        if max(size, len(content)) > most_bytes:
            raise InputError(f"{name}: longer than {most_bytes} bytes")
        text = content.decode("utf-8-sig")
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise InputError(f"{name}:{line}: a null byte: not a text file")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def lines(text: str) -> Iterator[str]:
    """The lines of `text`, each with its line feed, and no other character ends one.

    `io.StringIO` would copy the text at four bytes a character; `str.splitlines` ends lines at
    U+2028 and others that JSON strings may hold.
    """
    return (found[0] for found in _LINE.finditer(text))


def require_file(path: Path, name: str | Path) -> None:
    """Raises InputError for a folder or a device, which may never end; pipes may be read."""
    if "\0" in str(path):
        raise InputError(f"{str(name)!r}: no such file")
    with reading(name):
        mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode)):
        kind = "a folder" if stat.S_ISDIR(mode) else "a device"
        raise InputError(f"{name}: cannot be read: it is {kind}")


def write_text(path: Path, text: str, name: str | Path | None = None) -> None:
    """Writes `text` as UTF-8; raises InputError where that is not possible."""
    with writing(path if name is None else name):
        path.write_text(text, encoding="utf-8")


def write_whole(path: Path, text: str) -> None:
    """Writes `text` as UTF-8, in folders that are made; raises OSError.

    The file appears whole or not at all, whatever stops the process and whoever else writes it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
