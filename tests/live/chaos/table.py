"""The table: what became of the requests of each fault. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

EXACT = "exact"
"""Outcome of a request that came back whole, with as many tokens as it asked for."""


@dataclass(frozen=True, slots=True)
class Row:
    """One fault.

    Attributes:
        sent: requests that should come back, in the pass with Gimbal.
        exact: of those, completed with their exact token count.
        failed_alone: failed by vLLM alone in the same fault; None where that was not tried.
        failed_by_gimbal: completed by vLLM alone but not here.
        remark: what was seen.
        trouble: what should not have been, other than failed requests; empty is none.
    """

    fault: str
    sent: int
    exact: int
    failed_alone: int | None
    failed_by_gimbal: int
    remark: str = ""
    trouble: str = ""

    @property
    def ok(self) -> bool:
        return self.failed_by_gimbal == 0 and not self.trouble


def row_of(
    fault: str,
    here: Mapping[str, str],
    alone: Mapping[str, str] | None = None,
    remark: str = "",
    trouble: Sequence[str] = (),
) -> Row:
    """A row from the outcomes of both passes.

    Args:
        here: request -> `EXACT`, or why it failed, in the pass with Gimbal.
        alone: the same without; None where that was not tried, so that every failure counts as
            Gimbal's. A request that only one pass sent counts as completed in the other.
    """
    failed = {name for name, outcome in here.items() if outcome != EXACT}
    excused = {name for name, outcome in (alone or {}).items() if outcome != EXACT}
    reasons = sorted({here[name] for name in failed - excused})
    return Row(
        fault,
        sent=len(here),
        exact=len(here) - len(failed),
        failed_alone=None if alone is None else len(excused),
        failed_by_gimbal=len(failed - excused),
        remark=remark,
        trouble="; ".join([*dict.fromkeys(trouble), *reasons[:2]]),
    )


def render(rows: Sequence[Row]) -> Table:
    """The rows as people read them."""
    table = Table(title="chaos", show_lines=False)
    table.add_column("fault")
    for name in ("sent", "exact", "failed by\nvLLM alone", "failed by\nGimbal"):
        table.add_column(name, justify="right")
    table.add_column("remark", overflow="fold")
    for row in rows:
        alone = "-" if row.failed_alone is None else str(row.failed_alone)
        said = "; ".join(
            part for part in (row.trouble and f"FAILED: {row.trouble}", row.remark) if part
        )
        counts = (str(row.sent), str(row.exact), alone, str(row.failed_by_gimbal))
        table.add_row(row.fault, *counts, said, style=None if row.ok else "bold red")
    return table


def as_json(rows: Sequence[Row]) -> dict[str, Any]:
    """The rows for a file, with the verdict."""
    return {
        "ok": all(row.ok for row in rows),
        "failed_by_gimbal": sum(row.failed_by_gimbal for row in rows),
        "faults": [asdict(row) | {"ok": row.ok} for row in rows],
    }
