"""BurstGPT CSV (HPMLL/BurstGPT, arXiv 2401.17644).

Columns ``Timestamp`` (s), ``Model``, ``Request tokens``, ``Response tokens``, ``Total tokens``,
``Log Type``, and in later releases ``Session ID`` and ``Elapsed time``. Rows with no response
token are requests that failed when the trace was taken: they are left out, as in its
``without_fails`` files.
"""

from __future__ import annotations

from pathlib import Path

from gimbal.workloads.fields import csv_rows
from gimbal.workloads.trace import Trace, TraceRequest, make_trace

COLUMNS = ("Timestamp", "Request tokens", "Response tokens")


def read(path: Path) -> Trace:
    """Reads a BurstGPT CSV file; raises InputError naming file, line, field and value."""
    requests = []
    for row in csv_rows(path, COLUMNS):
        prompt = row.tokens("Request tokens")
        output = row.tokens("Response tokens")
        arrival = row.seconds("Timestamp")
        if prompt and output:
            requests.append(TraceRequest(arrival, prompt, output, row.text("Session ID")))
    return make_trace("burstgpt", requests)
