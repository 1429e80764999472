"""Runs targets on seeded inputs and counts what became of them."""

from __future__ import annotations

import contextlib
import random
import resource
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from gimbal.core.errors import InputError

Case = Callable[[random.Random], None]
SHOWN_FAILURES = 3
MOST_BYTES = 6 * 2**30
"""Address space beyond what the process has: importing PyTorch takes most of that."""


@dataclass(frozen=True, slots=True)
class Target:
    """Something that takes inputs.

    Attributes:
        name: as in the table.
        share: of all inputs of a long run; shares of all targets need not add up to one.
        case: makes one input and gives it to the target. It returns when the input was taken and
            every invariant holds. It raises InputError when the input was refused as documented.
            Anything else that it raises is a failure.
    """

    name: str
    share: float
    case: Case


@dataclass(slots=True)
class Outcome:
    """What became of a target's inputs.

    Attributes:
        taken, refused, failed: counts of inputs.
        failures: (index, message) of the first few of those that failed, one of a kind.
    """

    name: str
    taken: int = 0
    refused: int = 0
    failed: int = 0
    seconds: float = 0.0
    failures: list[tuple[int, str]] = field(default_factory=list)
    kinds: dict[str, int] = field(default_factory=dict)

    @property
    def inputs(self) -> int:
        return self.taken + self.refused + self.failed


def shares_of(targets: Iterable[Target], examples: int) -> dict[str, int]:
    """Inputs per target; at least one each, and `examples` in all where that allows it."""
    targets = list(targets)
    total = sum(target.share for target in targets)
    counts = {t.name: max(1, int(examples * t.share / total)) for t in targets}
    largest = max(targets, key=lambda target: target.share).name
    counts[largest] += max(0, examples - sum(counts.values()))
    return counts


def input_of(seed: int, target: str, index: int) -> random.Random:
    """The source of randomness of one input: the same in every run and on every machine."""
    return random.Random(f"{seed}/{target}/{index}")


@contextlib.contextmanager
def _bounded_memory() -> Iterator[None]:
    """An input of a few bytes that asks for more than `MOST_BYTES` fails, not the machine."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MOST_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit if hard < 0 else min(limit, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def run(target: Target, count: int, seed: int) -> Outcome:
    """Gives `count` inputs to `target`."""
    outcome = Outcome(target.name)
    began = time.perf_counter()
    with warnings.catch_warnings(), _bounded_memory():
        warnings.simplefilter("ignore")  # numpy's, about overflow: the invariants look at results
        for index in range(count):
            _one(target, index, input_of(seed, target.name, index), outcome)
    outcome.seconds = time.perf_counter() - began
    return outcome


def _one(target: Target, index: int, rng: random.Random, outcome: Outcome) -> None:
    try:
        target.case(rng)
    except InputError as error:
        outcome.refused += 1
        if "\n" in str(error):
            _failed(outcome, index, AssertionError(f"message of several lines: {error!s}"))
            outcome.refused -= 1
    except Exception as error:
        _failed(outcome, index, error)
    else:
        outcome.taken += 1


def _failed(outcome: Outcome, index: int, error: Exception) -> None:
    outcome.failed += 1
    frames = traceback.extract_tb(error.__traceback__)
    frames = [frame for frame in frames if frame.name != "check"]
    place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    kind = f"{type(error).__name__} {place}"
    outcome.kinds[kind] = outcome.kinds.get(kind, 0) + 1
    if outcome.kinds[kind] == 1 and len(outcome.failures) < SHOWN_FAILURES:
        said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        outcome.failures.append((index, f"{said} ({place})"))
