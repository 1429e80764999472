"""Faults in Gimbal's own functions: which ones a run calls, and how to have one of them raise.

A function's code is exchanged, not its name: whoever holds it, as a method, a property or under an
imported name, meets the fault.
"""

from __future__ import annotations

import gc
import random
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any, NamedTuple

import gimbal
from gimbal.core import compiled
from gimbal.vllm_plugin.seams import SEAMS

PACKAGE = str(Path(gimbal.__file__).parent)

SHELLS = {
    "core.guard:LevelGuard.__init__": "the guard",
    "core.guard:LevelGuard.run": "the guard",
    "core.guard:LevelGuard.fell_back": "the guard",
    "core.guard:LevelGuard.succeeded": "the guard",
    "core.guard:_said": "the guard",
    "engine.identity:_prepare": "guards what it does; bad configuration is seen at start",
    "engine.scheduler:build_scheduler": "called by vLLM; guards what it does",
    "engine.scheduler:GimbalSchedulerMixin._gimbal_report": "guards every event of the signals",
    "engine.scheduler:GimbalSchedulerMixin._gimbal_without_signals": "ends the signals, guarded",
    "engine.refusals:_signals": "two attributes of the scheduler",
    "engine.refusals:_guard": "an attribute of the scheduler",
    "queue.level:GimbalQueueMixin._gimbal_install_queue": "guards the making of the level",
    "queue.waiting_queue:GimbalRequestQueue._guarded": "guards the ordering",
    "queue.waiting_queue:GimbalRequestQueue._fall_back": "the fallback itself",
    "queue.waiting_queue:GimbalRequestQueue._hand_over": "the fallback itself",
    "dispatch.hook:front_end_of": "one getattr",
    "dispatch.hook:FrontEnd.route": "calls vLLM's method once, around it everything is guarded",
    "dispatch.hook:_pinned": "calls vLLM's method once",
    "dispatch.hook:FrontEnd.finished": "guards every request that ended",
    "dispatch.unsent:take_back": "guards what it does",
    "dispatch.recording:start": "guards what it does",
    "dispatch.recording:sent": "guards what it does",
    "dispatch.recording:received": "guards what it does",
    "placement.member:member_of": "one getattr",
    "placement.member:join": "one setattr",
    "placement.hook:attach": "makes the member, guards the rest",
    "bridge:level_config": "read once, where the member is made: all ranks have one configuration",
    "bridge:gimbal_config": "the same",
    "placement.hook:_taking_part": "whether the group has left",
    "placement.hook:_map_in_force": "guards one copy",
    "placement.hook:_committed": "guards what follows a commit",
    "placement.member:Member.__init__": "assigns",
    "placement.member:Member.acting": "whether the rank is on",
    "placement.member:Member.begin": "assigns",
    "placement.member:Member.end": "assigns",
    "placement.member:Member.gather": "the collective: every rank takes part in it",
    "placement.member:Member._row": "guards the rank's row",
    "placement.member:Member._propose": "guards the rank's plan",
    "placement.agreement:outcome": "what all ranks make of the same votes",
}
"""Functions between an entry and the guard, and the fallbacks: nothing catches what they raise, so
nothing in them may fail. Name -> why it is one."""


def resolve(name: str) -> Any:
    """The object that ``module:attribute.path`` names; modules are below the plugin, or `core`."""
    module, _, path = name.partition(":")
    root = "gimbal." if module.startswith("core.") else "gimbal.vllm_plugin."
    found = import_module(root + module)
    for part in path.split("."):
        found = getattr(found, part) if not isinstance(found, type) else found.__dict__[part]
    return found


def code_of(found: Any) -> CodeType | None:
    """Of a function, also one that a property or a staticmethod holds."""
    found = getattr(found, "fget", None) or getattr(found, "__func__", found)
    return getattr(found, "__code__", None)


def outside() -> set[CodeType]:
    """Code that faults are not put into: entries, shells, and kernels that may be compiled."""
    names = {seam.entry for seam in SEAMS if seam.entry} | set(SHELLS)
    plain = {kernel.plain.__code__ for kernel in compiled._KERNELS}
    return plain | {code for name in names if (code := code_of(resolve(name))) is not None}


class Called(NamedTuple):
    """One of Gimbal's functions."""

    name: str
    function: FunctionType


def called(run: Callable[[], object]) -> tuple[list[Called], set[str]]:
    """Gimbal's functions that `run` calls, in any thread it starts, sorted by name; the entries
    among them, by their names in the table.
    """
    calls: set[CodeType] = set()

    def watch(frame: Any, event: str, _arg: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            calls.add(frame.f_code)

    threading.setprofile(watch)
    sys.setprofile(watch)
    try:
        run()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    codes = calls - outside()
    found = []
    for holder in gc.get_referrers(*codes):
        if not isinstance(holder, FunctionType) or holder.__code__ not in codes:
            continue
        code = holder.__code__
        # Functions that are made anew for each use are their maker's; a cell belongs to a class.
        made_anew = "<locals>" in code.co_qualname or code.co_freevars
        if not made_anew and code.co_name != "__del__":
            found.append(Called(name_of(code), holder))
    met = {name_of(code).removeprefix("vllm_plugin.").split(".<locals>")[0] for code in calls}
    return sorted(found, key=lambda one: one.name), met & {seam.entry for seam in SEAMS}


def name_of(code: CodeType) -> str:
    """``module:qualified.name`` below the package."""
    module = Path(code.co_filename).relative_to(PACKAGE).with_suffix("")
    return f"{'.'.join(module.parts)}:{code.co_qualname}"


def entries(*modules: str) -> set[str]:
    """Those of the table in these modules and folders of the plugin."""
    return {seam.entry for seam in SEAMS if seam.entry.startswith(modules)}


class Injected(RuntimeError):
    """A fault of a walk."""


_here = threading.local()


@contextmanager
def by_the_test() -> Iterator[None]:
    """Calls of Gimbal's functions that no entry makes: none of them fails in this thread."""
    _here.spared = True
    try:
        yield
    finally:
        _here.spared = False


def _trampoline(*args: Any, **kwargs: Any) -> Any:
    target: Any = "target"
    return target(*args, **kwargs)


@contextmanager
def fault(walk: Walk) -> Iterator[list[int]]:
    """While it lasts the functions of `walk` raise as it says: before they do anything, or after
    they have done all. Yields a list that grows by one with each fault.
    """
    raised: list[int] = []
    with ExitStack() as stack:
        for one in walk.functions:
            stack.enter_context(_exchanged(one.function, walk, raised))
        yield raised


@contextmanager
def _exchanged(function: FunctionType, walk: Walk, raised: list[int]) -> Iterator[None]:
    code = function.__code__
    original = FunctionType(
        code, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    original.__kwdefaults__ = function.__kwdefaults__

    def target(*args: Any, **kwargs: Any) -> Any:
        due = not getattr(_here, "spared", False) and walk.raises()
        answer = original(*args, **kwargs) if walk.after or not due else None
        if due:
            raised.append(1)
            raise Injected(code.co_qualname)
        return answer

    template = _trampoline.__code__
    constants = tuple(target if c == "target" else c for c in template.co_consts)
    function.__code__ = template.replace(
        co_consts=constants, co_name=code.co_name, co_qualname=code.co_qualname
    )
    try:
        yield
    finally:
        function.__code__ = code


def share(probability: float, seed: int) -> Callable[[], bool]:
    """True for that share of calls, by a random generator of each thread's own."""
    local = threading.local()

    def draws() -> bool:
        generator = getattr(local, "generator", None)
        if generator is None:
            name = threading.current_thread().name
            generator = local.generator = random.Random(f"{seed} {name}")
        return generator.random() < probability

    return draws


REQUESTS, SHARE = 500, 0.05
"""Of each walk; and of its calls that fail where not all do."""


class Walk(NamedTuple):
    """Functions that raise while one run goes on; of them that have `after`, once all is done."""

    functions: tuple[Called, ...]
    kind: str
    raises: Callable[[], bool]
    after: bool

    def __str__(self) -> str:
        first = self.functions[0].name
        what = first if len(self.functions) == 1 else first.partition(":")[0]
        return f"{what} ({self.kind}, {'after' if self.after else 'before'})"


def walks(functions: list[Called], one_thread: str = "") -> Iterator[Walk]:
    """Every function always, and all functions of a module at once at 5 %.

    Every other walk's faults come once all is done.
    With `one_thread` a function also fails always in the thread of that name alone; in `core`,
    where threads meet nowhere, it does so in place of always.
    """
    for number, one in enumerate(functions):
        after = bool(number % 2)
        if not one_thread or not one.name.startswith("core."):
            yield Walk((one,), "always", lambda: True, after)
        if one_thread:
            there = f"always in {one_thread}"
            alone = lambda: threading.current_thread().name == one_thread  # noqa: E731
            yield Walk((one,), there, alone, not after)
    modules: dict[str, list[Called]] = {}
    for one in functions:
        modules.setdefault(one.name.partition(":")[0], []).append(one)
    for seed, members in enumerate(modules.values()):
        yield Walk(tuple(members), "5 %", share(SHARE, seed), bool(seed % 2))


class Tally:
    """What the walks of a level have met; `wrong` must stay empty."""

    def __init__(
        self, what: str, functions: list[Called], each: str = f"{REQUESTS} requests"
    ) -> None:
        self.what, self.functions, self.each = what, len(functions), each
        self.walks = self.faults = self.fallbacks = self.off = 0
        self.wrong: list[str] = []

    def add(
        self, walk: Walk, raised: list[int], guards: Iterable[Any], off: bool, wrong: str | None
    ) -> None:
        """One walk: its faults, what the level's guards counted, whether it is off."""
        self.walks += 1
        self.faults += len(raised)
        self.fallbacks += sum(sum(guard.counts.values()) for guard in guards if guard is not None)
        self.off += off
        if wrong is not None:
            self.wrong.append(f"{walk}: {wrong}")

    def __str__(self) -> str:
        return (
            f"{self.what}: {self.functions} functions, {self.walks} walks of {self.each}, "
            f"{self.faults} faults, {self.fallbacks} fallbacks, {self.off} times off, "
            f"{len(self.wrong)} wrong"
        )
