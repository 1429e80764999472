"""One finding of ``gimbal doctor``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

Status = Literal["ok", "warning", "failed"]


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check saw.

    Attributes:
        check: what was looked at.
        status: ``failed`` means Gimbal will not work; ``warning`` that something is lost.
        found: what is there.
        advice: what to do, empty when all is well.
    """

    check: str
    status: Status
    found: str
    advice: str = ""


def report(findings: Iterable[Finding]) -> dict[str, Any]:
    """The findings as ``gimbal doctor --json`` prints them."""
    rows = [dataclasses.asdict(finding) for finding in findings]
    return {"ok": all(row["status"] != "failed" for row in rows), "checks": rows}
