"""Azure LLM inference traces 2023 (Azure/AzurePublicDataset, CC-BY-4.0).

Columns ``TIMESTAMP`` (date and time, up to 100 ns), ``ContextTokens``, ``GeneratedTokens``.
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from gimbal.core.numbers import as_real
from gimbal.workloads.fields import Row, csv_rows
from gimbal.workloads.trace import Trace, TraceRequest, make_trace

COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


def _timestamp_s(row: Row) -> float:
    """Seconds since the epoch. The trace has 7 decimals, one more than `datetime` reads."""
    value = row.get("TIMESTAMP")
    whole, _, fraction = str(value).partition(".")
    part = as_real("0." + fraction) if fraction.isdecimal() or not fraction else None
    try:
        seconds = (datetime.fromisoformat(whole) - datetime(1970, 1, 1)).total_seconds()
    except (TypeError, ValueError):
        part = None
    if part is None:
        raise row.fail("TIMESTAMP", value, "a date and time")
    return seconds + part


def read(path: Path) -> Trace:
    """Reads an Azure 2023 CSV file; raises InputError naming file, line, field and value."""
    requests = [
        TraceRequest(
            _timestamp_s(row), row.tokens("ContextTokens", 1), row.tokens("GeneratedTokens", 1)
        )
        for row in csv_rows(path, COLUMNS)
    ]
    return make_trace("azure", requests)
