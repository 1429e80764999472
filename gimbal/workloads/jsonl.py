"""Gimbal's own trace format: JSON lines (or CSV with these columns), one request each.

``{"arrival_s": 0.25, "prompt_tokens": 900, "output_tokens": 64, "session": "s1",
"domain": "code", "prefix_blocks": [17, 18]}``; the last three are optional. A first line
``{"prefix_block_tokens": 16}`` sets the size of a prefix block (default 16); it may come again, so
that files can be put together.
"""

from __future__ import annotations

from pathlib import Path

from gimbal.core.errors import nearest
from gimbal.core.files import writing
from gimbal.core.json_text import to_json
from gimbal.workloads.fields import Row, records
from gimbal.workloads.trace import Trace, TraceRequest, make_trace

BLOCK_TOKENS = 16
FIELDS = ("arrival_s", "prompt_tokens", "output_tokens", "session", "domain", "prefix_blocks")


def read(path: Path) -> Trace:
    """Reads Gimbal's JSONL; raises InputError naming file, line, field and value."""
    block_tokens = BLOCK_TOKENS
    requests: list[TraceRequest] = []
    for row in records(path)[1]:
        if "prefix_block_tokens" in row.values:
            own = row.tokens("prefix_block_tokens", 1)
            if requests and own != block_tokens:
                raise row.fail("prefix_block_tokens", own, f"{block_tokens}, as above")
            block_tokens = own
            continue
        requests.append(_request(row, block_tokens))
    return make_trace(path.stem, requests, block_tokens)


def _request(row: Row, block_tokens: int) -> TraceRequest:
    for key, value in row.values.items():
        if key not in FIELDS:
            raise row.fail(key, value, f"a known field{nearest(key, FIELDS)}")
    prompt = row.tokens("prompt_tokens", 1)
    blocks = row.hash_ids("prefix_blocks")
    if len(blocks) > -(-prompt // block_tokens):
        raise row.fail("prefix_blocks", len(blocks), f"at most {-(-prompt // block_tokens)} ids")
    return TraceRequest(
        row.seconds("arrival_s"),
        prompt,
        row.tokens("output_tokens", 1),
        row.text("session"),
        row.text("domain"),
        blocks,
    )


def write(trace: Trace, path: Path) -> None:
    """Writes `trace` so that `read` returns it; unset fields are left out."""
    with writing(path), path.open("w", encoding="utf-8") as file:
        if trace.prefix_block_tokens:
            file.write(header(trace.prefix_block_tokens))
        file.writelines(map(line, trace.requests))


def header(block_tokens: int) -> str:
    """The line that says how long a prefix block is."""
    return to_json({"prefix_block_tokens": block_tokens}) + "\n"


def line(request: TraceRequest) -> str:
    """The line of one request."""
    values = {name: getattr(request, name) for name in FIELDS}
    kept = {key: value for key, value in values.items() if value not in (None, ())}
    return to_json(kept) + "\n"
