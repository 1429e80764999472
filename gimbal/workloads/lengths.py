"""Sets of real (prompt, output) lengths without arrival times.

Two shapes: JSON ``{"data": [{"input_length", "output_length"}, ...]}`` (the BurstGPT sample), and
CSV with ``num_prefill_tokens,num_decode_tokens`` (Vidur and Etalon length lists).
"""

from __future__ import annotations

from pathlib import Path

from gimbal.core import json_text
from gimbal.core.errors import InputError
from gimbal.workloads.fields import Row, csv_rows
from gimbal.workloads.trace import Trace, TraceRequest, make_trace

CSV_COLUMNS = ("num_prefill_tokens", "num_decode_tokens")


def read_json(path: Path) -> Trace:
    """Reads the JSON shape; rows are counted from 1 and reported as lines."""
    document = json_text.read_json(path)
    rows = document.get("data") if isinstance(document, dict) else None
    if not isinstance(rows, list):
        raise InputError(f"{path}: expected an object with a list 'data'")
    requests = []
    for number, values in enumerate(rows, start=1):
        row = Row(path, number, values if isinstance(values, dict) else {})
        requests.append(
            TraceRequest(0.0, row.tokens("input_length", 1), row.tokens("output_length", 1))
        )
    return make_trace(path.stem, requests, has_arrivals=False)


def read_csv(path: Path) -> Trace:
    """Reads the CSV shape."""
    requests = [
        TraceRequest(0.0, row.tokens(CSV_COLUMNS[0], 1), row.tokens(CSV_COLUMNS[1], 1))
        for row in csv_rows(path, CSV_COLUMNS)
    ]
    return make_trace(path.stem, requests, has_arrivals=False)
