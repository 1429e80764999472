"""What the API servers of one server tell each other, so that whichever is asked answers for all.

Each writes one small file beside the board every few seconds and reads the others'. vLLM starts as
many API servers as engines by default, and a browser reaches any of them.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from pathlib import Path
from typing import Any

from gimbal.board.clock import now_us
from gimbal.board.file import BESIDE
from gimbal.core.errors import InputError
from gimbal.core.json_text import parse_json, to_json
from gimbal.core.numbers import as_real
from gimbal.core.snapshot import MAX_FRONT_ENDS

MOST_BYTES = 1 << 18
"""Of one file; a front end of 64 engines writes some 60 KB."""
STALE_US = 15e6
"""A front end that has said nothing for as long is gone."""
_INDEX = re.compile(rf"{re.escape(BESIDE)}(\d{{1,2}})$")


class Shared:
    """The files of one server's front ends.

    Args:
        board: path of its board.
        index: this front end.
    """

    def __init__(self, board: Path, index: int) -> None:
        self._board = board
        self.index = index
        self._path = board.with_name(f"{board.name}{BESIDE}{index}")

    def publish(self, document: dict[str, Any]) -> None:
        """Replaces what this front end has said. Raises OSError where there is no room."""
        draft = self._path.with_name(f"{self._path.name}.draft")
        with contextlib.suppress(FileNotFoundError):
            draft.unlink()
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        with os.fdopen(os.open(draft, flags, 0o600), "wb") as file:
            file.write(to_json(document | {"time_us": now_us()}).encode())
        draft.replace(self._path)

    def others(self) -> list[dict[str, Any]]:
        """What the others have said lately; a file that is not one of theirs is passed over."""
        found = []
        for path in self._board.parent.glob(f"{self._board.name}{BESIDE}*"):
            name = _INDEX.search(path.name)
            if name is None or not int(name[1]) < MAX_FRONT_ENDS or int(name[1]) == self.index:
                continue
            with contextlib.suppress(OSError, InputError):
                document = parse_json(_read(path), path.name)
                said_us = as_real(document.get("time_us")) if isinstance(document, dict) else None
                if said_us is not None and abs(now_us() - said_us) < STALE_US:
                    found.append(document)
        return found

    def close(self) -> None:
        """Takes this front end's file away."""
        with contextlib.suppress(OSError):
            self._path.unlink()


def _read(path: Path) -> str:
    """The text of a plain file of this user; raises OSError for anything else."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(fd, "rb") as file:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode) or info.st_uid != os.geteuid():
            raise OSError("not a file of this server")
        return file.read(MOST_BYTES).decode(errors="replace")
