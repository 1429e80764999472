"""Errors that reach a user.

`InputError` is raised for anything the user can mend: the command line prints its message on one
line and exits with code 2. Every other exception is a bug or an environment failure (exit code 1).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

MOST_CHARACTERS = 1000
"""Of a message; names and values of the user's that stand in it may be longer."""


class InputError(ValueError):
    """Bad argument or input; the message says what is wrong and where, on one line."""

    def __init__(self, message: object = "") -> None:
        text = " ".join(str(message).splitlines())
        super().__init__(text if len(text) <= MOST_CHARACTERS else text[:MOST_CHARACTERS] + "...")


class PolicyError(InputError):
    """A policy failed or answered nonsense; the message names the policy."""


def one_line(error: object) -> str:
    """What `error` says, on one line of bounded length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


def with_type(error: BaseException) -> str:
    """`one_line` of `error` behind the name of its type: for what is not ours to have raised."""
    return f"{type(error).__name__}: {one_line(error)}"


def nearest(name: str, valid: Iterable[str]) -> str:
    """Ends an "unknown NAME" message: `` (did you mean 'x'?)``, or the choices."""
    choices = sorted(valid)
    close = difflib.get_close_matches(name[:80], choices, n=1, cutoff=0.5)  # slow for a long one
    if close:
        return f" (did you mean {close[0]!r}?)"
    return f" (choose from {', '.join(choices)})"
