"""Mooncake traces (kvcache-ai/Mooncake, FAST'25 release, Apache-2.0): JSON lines.

``timestamp`` (ms), ``input_length``, ``output_length``, ``hash_ids``: one id per 512-token block
of the prompt, equal ids meaning equal content up to and including that block.
"""

from __future__ import annotations

from pathlib import Path

from gimbal.workloads.fields import Row, json_rows
from gimbal.workloads.trace import Trace, TraceRequest, make_trace

BLOCK_TOKENS = 512


def read(path: Path) -> Trace:
    """Reads a Mooncake JSONL file; raises InputError naming file, line, field and value."""
    return make_trace("mooncake", [_request(row) for row in json_rows(path)], BLOCK_TOKENS)


def _request(row: Row) -> TraceRequest:
    prompt = row.tokens("input_length", 1)
    blocks = row.hash_ids("hash_ids")
    # The last block of a prompt is usually partial, so one id may cover fewer than 512 tokens.
    if len(blocks) > -(-prompt // BLOCK_TOKENS):
        raise row.fail("hash_ids", len(blocks), f"at most {-(-prompt // BLOCK_TOKENS)} ids")
    return TraceRequest(
        row.seconds("timestamp") / 1000.0,
        prompt,
        row.tokens("output_length", 1),
        prefix_blocks=blocks,
    )
