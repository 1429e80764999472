"""Ctrl-C at a bad moment, and in processes that are not to decide what it means."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import resource_tracker


@contextmanager
def deferred() -> Iterator[Sequence[int]]:
    """SIGINT that comes meanwhile arrives afterwards; other threads than the main one get none.

    Yields what has come, so that long work may end early.
    """
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield came
        return
    before = signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        yield came
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        signal.raise_signal(signal.SIGINT)


@contextmanager
def shielded() -> Iterator[None]:
    """`deferred`, and processes that are started meanwhile never get SIGINT.

    Ctrl-C reaches every process of the foreground group. One that still imports has no handler
    yet and would end with a traceback; the mask it inherits is there from its first moment.
    """
    resource_tracker.ensure_running()  # where that starts one it lets SIGINT through again
    with deferred():
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
