"""Small numeric functions that run as they are, and compiled once there has been time for it.

numba takes about a second to import and to compile even a small function (less when its cache on
disk has it). A request must never wait for that: a `Kernel` is called from the first moment on and
runs the plain function until the compiled one is there. Both are the same source, so there is one
definition of each formula and a decision does not depend on which of the two made it.
"""

from __future__ import annotations

import functools
import logging
import sys
import threading
import types
import zlib
from collections.abc import Callable
from typing import Any, cast

from gimbal.core.caches import COMPILED, keep_compiled_code

logger = logging.getLogger("vllm.gimbal")

_KERNELS: list[Kernel] = []
_FROZEN = (int, float, bool)
_lock = threading.Lock()
_started = False


class Kernel:
    """A function over arrays and floats, and its compiled form.

    Args:
        function: the plain definition: loops and scalars, no other Python objects.
        signature: its types in numba's notation; arguments must have exactly these, so that no
            call can start a compilation.

    Attributes:
        plain: `function`.
        call: what to call now: `plain`, later the compiled form.
    """

    def __init__(self, function: Callable[..., Any], signature: str) -> None:
        self.plain = function
        self.signature = signature
        self.call = function
        _KERNELS.append(self)

    @property
    def compiled(self) -> bool:
        """Whether `call` is the compiled form."""
        return self.call is not self.plain

    def compile(self) -> None:
        """Compiles, or loads numba's cache; `call` is the compiled form afterwards."""
        if not self.compiled:
            self.call = njit(self.signature)(_named_by_constants(self.plain))


def njit(*signature: str, **options: Any) -> Callable[[Any], Any]:
    """numba's ``njit``; what it compiles is kept for other processes where anything can be."""
    keeps = _keeps_compiled_code()
    import numba

    return cast(Callable[[Any], Any], numba.njit(*signature, cache=keeps, **options))


@functools.cache
def _keeps_compiled_code() -> bool:
    keeps = keep_compiled_code()
    if keeps and "numba" in sys.modules:
        sys.modules["numba"].config.reload_config()  # it had read the environment before
    if not keeps:
        logger.warning(
            "Gimbal: no folder can be written, so every process compiles for itself, up to a "
            "minute of a core beside its work; set %s to a writable folder",
            COMPILED,
        )
    return keeps


def _named_by_constants(function: Callable[..., Any]) -> Callable[..., Any]:
    """A copy whose name in numba's cache changes with the module constants that it freezes.

    numba looks at the source file of the function alone; a column number comes from another one.
    """
    known = function.__globals__
    constants = [(n, known[n]) for n in function.__code__.co_names if type(known.get(n)) in _FROZEN]
    copy = types.FunctionType(function.__code__, known, function.__name__, function.__defaults__)
    copy.__qualname__ = f"{function.__name__}_{zlib.crc32(repr(constants).encode()):08x}"
    return copy


def compile_kernels() -> None:
    """Compiles every kernel defined so far and waits for it; for batch work like a simulation."""
    with _lock:
        for kernel in list(_KERNELS):
            kernel.compile()


def compile_in_background() -> None:
    """Compiles every kernel defined so far, once per process, while the plain forms serve."""
    global _started
    with _lock:
        if _started:
            return
        _started = True
    threading.Thread(target=_compile_or_log, name="gimbal-compile", daemon=True).start()


def _compile_or_log() -> None:
    try:
        compile_kernels()
    except Exception:  # slower decisions, and nothing else
        logger.warning(
            "Gimbal: kernels could not be compiled; decisions stay slower", exc_info=True
        )
