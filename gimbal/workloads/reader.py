"""Reads a trace file of any format of `formats`."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path

from gimbal.core.errors import InputError
from gimbal.core.files import reading
from gimbal.core.numbers import shown
from gimbal.workloads.fields import Row, records
from gimbal.workloads.formats import BINARY, DATE, FORMATS, UNITS, UNREAD, Format, fits
from gimbal.workloads.texts import BYTES_PER_TOKEN, TokenCounter
from gimbal.workloads.trace import Trace, TraceRequest, make_trace

TIMES = frozenset(
    ("arrival", "arrivals", "arrived", "at", "created", "date", "datetime", "sent", "start",
     "started", "time", "timestamp", "timestamps", "times", "ts")
)  # fmt: skip
"""Words of a field's name that say it may hold arrivals."""
COMMON_BLOCKS = (16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True, slots=True)
class TraceOptions:
    """What a file does not say of itself.

    Attributes:
        block_tokens: tokens of a prefix block; None is the format's.
        time_unit: of arrivals, a key of `UNITS`; None is the format's.
        tokenizer: counts the tokens of texts; None estimates them.
    """

    block_tokens: int | None = None
    time_unit: str | None = None
    tokenizer: Path | None = None


def read_trace(path: Path, options: TraceOptions | None = None) -> Trace:
    """The trace in a file.

    Raises InputError naming file, line, field and value; for a format that is not read, the formats
    that are; for a field that seems to hold arrivals and is none of the format's.
    """
    options = options or TraceOptions()
    _refuse_binary(path)
    keys, rows = records(path)
    form = _format(path, keys)
    _check(path, form, options)
    count = TokenCounter(options.tokenizer)
    if form.read is not None:
        _check_texts(path, form, count, options)
        return form.read(path)
    unit = options.time_unit or form.unit
    block_tokens = options.block_tokens or form.block_tokens
    requests: list[TraceRequest] = []
    left_out = 0
    for row in rows if form.unpack is None else form.unpack(rows, count):
        request = None if row is None else _request(form, row, unit, block_tokens)
        if request is None:
            left_out += 1
        else:
            requests.append(request)
    _check_texts(path, form, count, options)
    blocks = block_tokens if any(r.prefix_blocks for r in requests) else 0
    notes = _notes(form, unit, blocks, left_out, count.used and options.tokenizer is None)
    return make_trace(path.stem, requests, blocks, form.arrival is not None, notes)


def _refuse_binary(path: Path) -> None:
    with reading(path), path.open("rb") as file:
        start = file.read(8)
    for magic, name in BINARY.items():
        if start.startswith(magic):
            raise InputError(f"{path}: cannot be read: {name}; convert it to CSV or JSON lines")


def _format(path: Path, keys: Collection[str]) -> Format:
    for form in FORMATS:
        if form.fits(keys):
            return form
    makers = ", ".join(dict.fromkeys(form.name.split()[0] for form in FORMATS))
    known = f"formats that are read (docs/traces.md): {makers}"
    for other in UNREAD:
        if fits(other.keys, keys):
            raise InputError(f"{path}: {other.name}: {other.instead}; {known}")
    found = shown(", ".join(map(str, islice(keys, 20))))
    raise InputError(f"{path}:1: unknown trace format with fields {found}; {known}")


def _check(path: Path, form: Format, options: TraceOptions) -> None:
    """Raises InputError for options that do not fit the file."""
    fixed = form.read is not None or form.unit == DATE or form.arrival is None
    if options.time_unit is not None and fixed:
        raise InputError(f"--trace-time-unit: {path}: {form.name} has no times in a unit to choose")
    if options.block_tokens is not None and (form.read is not None or form.blocks is None):
        raise InputError(
            f"--trace-block-size: {path}: {form.name} has no blocks of a size to choose"
        )


def _check_texts(path: Path, form: Format, count: TokenCounter, options: TraceOptions) -> None:
    if options.tokenizer is not None and not count.used:
        raise InputError(f"--trace-tokenizer: {path}: {form.name} holds lengths, no texts")


def _request(form: Format, row: Row, unit: str, block_tokens: int) -> TraceRequest | None:
    """The request of a row; None for one without a prompt or an answer."""
    prompt, output = row.tokens(form.prompt), row.tokens(form.output)
    if form.arrival is None:
        _refuse_times(row)
        arrival_s = 0.0
    elif form.unit == DATE:
        arrival_s = row.date_s(form.arrival)
    else:
        arrival_s = row.seconds(form.arrival, UNITS[unit])
    if not prompt or not output:
        return None
    blocks = row.hash_ids(form.blocks) if form.blocks else ()
    # The last block of a prompt is usually partial, so one id may cover fewer tokens.
    most = -(-prompt // block_tokens) if blocks else 0
    if len(blocks) > most:
        fitting = [str(b) for b in COMMON_BLOCKS if -(-prompt // b) == len(blocks)]
        hint = f"; {' or '.join(fitting)} would fit" if fitting else ""
        raise row.fail(
            form.blocks or "",
            len(blocks),
            f"at most {most} ids for {prompt} tokens in blocks of {block_tokens} tokens, which "
            f"--trace-block-size sets{hint} (times are taken in {unit}, which --trace-time-unit "
            "sets)",
        )
    session = row.text(form.session) if form.session else None
    return TraceRequest(arrival_s, prompt, output, session, None, blocks)


def _refuse_times(row: Row) -> None:
    for name, value in row.values.items():
        if _says_time(name) and value not in (None, ""):
            expected = "no times beside a set of lengths: name it as a format with arrivals does"
            raise row.fail(name, value, f"{expected} (docs/traces.md), or leave it out")


@lru_cache(maxsize=1024)
def _says_time(name: str) -> bool:
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name)
    return not TIMES.isdisjoint(word.lower() for word in words)


def _notes(
    form: Format, unit: str, block_tokens: int, left_out: int, estimated: bool
) -> tuple[str, ...]:
    """What was assumed in reading, for the user to see."""
    parts = []
    if form.arrival is None:
        parts.append("no times, so arrivals are generated")
    elif form.unit != DATE:
        parts.append(f"times in {unit}")
    if block_tokens:
        parts.append(f"prefix blocks of {block_tokens} tokens")
    if estimated:
        parts.append(f"lengths of texts estimated at {BYTES_PER_TOKEN} bytes per token")
    if left_out:
        parts.append(f"{left_out} requests without prompt or answer left out")
    return (f"read as {form.name}: {', '.join(parts)}" if parts else f"read as {form.name}",)
