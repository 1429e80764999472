"""How far two servers' answers are apart, and whether that is within the tolerance. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tests.live.check.completions import Greedy

FLOAT32_MEAN = 1e-4
FLOAT32_P99 = 1e-3
NEAR_TIE = 0.1
"""A greedy token may differ where the reference's two best were this close (natural log)."""


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Bounds on the absolute differences of log-probabilities in one row."""

    mean: float = math.inf
    p99: float = math.inf


FLOAT32 = Tolerance(FLOAT32_MEAN, FLOAT32_P99)


@dataclass(frozen=True, slots=True)
class Reference:
    """What one engine without expert parallelism answers.

    Attributes:
        prompts: token ids.
        continuations: greedy, one per prompt.
        sequences: the tokens that are scored: prompts with forced continuations.
        scores: per sequence, the log-probability of every token after the first.
    """

    prompts: tuple[tuple[int, ...], ...]
    continuations: tuple[Greedy, ...]
    sequences: tuple[tuple[int, ...], ...]
    scores: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True)
class AgreementRow:
    """One line of the table; differences are absolute, in natural log.

    Attributes:
        migrations: rearrangements that had moved experts when the row was measured.
        moved_slots: expert slots they changed.
        tokens: log-probabilities compared.
        greedy_equal: decoded tokens equal to the reference's up to each first difference.
        greedy_wrong: continuations that left the reference's where there was no near-tie.
    """

    layout: str
    when: str
    migrations: int
    moved_slots: int
    tokens: int
    mean: float
    p99: float
    max: float
    greedy_equal: int
    greedy_total: int
    greedy_wrong: int
    ok: bool


def compare(
    reference: Reference,
    passes: Sequence[Sequence[Sequence[float]]],
    decoded: Sequence[Greedy],
    layout: str,
    when: str,
    migrations: Mapping[str, int],
    tolerance: Tolerance,
) -> AgreementRow:
    """One row from the scores of every pass and one greedy decode of every prompt."""
    differences = sorted(
        abs(a - b)
        for scores in passes
        for got, want in zip(scores, reference.scores, strict=True)
        for a, b in zip(got, want, strict=True)
    )
    mean = sum(differences) / len(differences)
    p99 = differences[math.ceil(0.99 * len(differences)) - 1]
    agreement = [
        greedy_agreement(want, got)
        for want, got in zip(reference.continuations, decoded, strict=True)
    ]
    wrong = sum(not at_tie for _, at_tie in agreement)
    return AgreementRow(
        layout=layout,
        when=when,
        migrations=int(migrations.get("rearrangements", 0)),
        moved_slots=int(migrations.get("slots", 0)),
        tokens=len(differences),
        mean=mean,
        p99=p99,
        max=differences[-1],
        greedy_equal=sum(equal for equal, _ in agreement),
        greedy_total=sum(len(c.tokens) for c in reference.continuations),
        greedy_wrong=wrong,
        # A difference that is not a number is outside as well.
        ok=bool(mean <= tolerance.mean and p99 <= tolerance.p99) and wrong == 0,
    )


def greedy_agreement(want: Greedy, got: Greedy) -> tuple[int, bool]:
    """Equal leading tokens, and whether the first difference (if any) is at a near-tie."""
    for i, (a, b) in enumerate(zip(want.tokens, got.tokens, strict=True)):
        if a != b:
            return i, want.logprobs[i] - want.top[i].get(b, -math.inf) <= NEAR_TIE
    return len(want.tokens), True


HEADER = (
    f"{'layout':<34}{'when':<25}{'migr.':>6}{'slots':>7}{'tokens':>8}"
    f"{'mean':>10}{'p99':>10}{'max':>10}{'greedy':>10}{'wrong':>7}"
)


def render(row: AgreementRow) -> str:
    """The row as one line under `HEADER`."""
    return (
        f"{row.layout:<34}{row.when:<25}{row.migrations:>6}{row.moved_slots:>7}{row.tokens:>8}"
        f"{row.mean:>10.2e}{row.p99:>10.2e}{row.max:>10.2e}"
        f"{row.greedy_equal:>6}/{row.greedy_total:<3}{row.greedy_wrong:>7}"
        f"  {'ok' if row.ok else 'OUTSIDE'}"
    )
