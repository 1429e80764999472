"""Writes docs/traces.md: the trace formats that are read, from their table.

.venv/bin/python -m scripts.traces_page [--check]
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path

from gimbal.workloads.formats import BINARY, DATE, FORMATS, UNREAD, Format
from scripts.pages import keep

OUT = Path(__file__).resolve().parent.parent / "docs" / "traces.md"

HEAD = """# Traces

`--trace FILE` of `gimbal simulate` and `gimbal bench` reads the formats below; nothing else about a
file but its content matters, its name least of all. A file is a sequence of records: the rows of a
CSV file with a header (commas, semicolons or tabs), the lines of a JSON-lines file, the items of a
JSON list (one under `data` too), or one JSON document. The keys of the first record tell the
format. In JSON lines nothing but a line feed ends a line, so that texts may hold U+2028 and its
like.

The run says on standard error what was assumed: unit of time, size of prefix blocks, how texts were
counted, how many requests were left out since they had no prompt or no answer. Three options say
otherwise:

| option | does |
|---|---|
| `--trace-block-size N` | tokens of one hash id (Dynamo writes 64 and others in Mooncake's format) |
| `--trace-time-unit s`, `ms`, `us`, `ns` | unit of the times |
| `--trace-tokenizer FOLDER` | counts texts by its `tokenizer.json` (package `tokenizers`, which vLLM has); without it a token is 4 bytes of UTF-8 |

Arrivals are never dropped silently: a set of lengths with a field whose name speaks of time
(`sentAt`, `created_time`, ...) that is no field of the format is refused by that name. Without
times, arrivals are generated (`--arrivals`).

`make pages` writes this page from `gimbal/workloads/formats.py`; `tests/workloads/samples.py` has a
small file of every format. A new format is an entry of that table.

## Formats
"""  # noqa: E501

ROUTING = """## Recorded routing

`gimbal stats FILE` and `gimbal place --routing FILE` read what was recorded of experts, by content
too:

| file | is read as |
|---|---|
| `.npz` with `counts` | `gimbal stats --out`, `GET /gimbal/routing` |
| `.npz` with `topk_idx` [layer, token, top_k] | choices per token, one source per file |
| `.npy` [token, layer, top_k] | vLLM's `routed_experts`, one source per file |
| `torch.save` with `logical_count` | SGLang's recorder, modes `stat` and `stat_approx`: all ranks summed, one source |
| `torch.save` with `records` | SGLang's recorder, modes `per_token` (`topk_ids_of_layer`) and `per_pass` (`global_physical_count`): one source per rank |

SGLang writes a file per rank in the last two modes: give all of them. Its DeepEP backend counts
what a rank receives, not what it sends, in the modes without `topk_ids_of_layer`; then sources are
not to be had. A shared expert that SGLang fuses into the routed ones is chosen by an id beyond the
placement: record with `--disable-shared-experts-fusion`.
"""  # noqa: E501


def page() -> str:
    """The page for the tables of `gimbal.workloads.formats`."""
    return "\n".join([HEAD, *_formats(), "", "## What is not read", "", *_unread(), "", ROUTING])


def _formats() -> Iterator[str]:
    yield "| format | told by | arrival | prompt, output | session | blocks | how | whose |"
    yield "|---|---|---|---|---|---|---|---|"
    for form in FORMATS:
        told = ", ".join(" or ".join(f"`{a}`" for a in key.split("|")) for key in form.keys)
        unit = "date and time" if form.unit == DATE else form.unit
        cells = [
            form.name,
            told,
            f"`{form.arrival}` ({unit})" if form.arrival else "none",
            f"`{form.prompt}`, `{form.output}`" if form.prompt != "prompt" else "",
            f"`{form.session}`" if form.session else "",
            f"`{form.blocks}` ({form.block_tokens} tokens)" if form.blocks else "",
            _how(form),
            form.source,
        ]
        yield f"| {' | '.join(cells)} |"


def _how(form: Format) -> str:
    """What is done to the records, from the docstring of what does it."""
    text = (inspect.getdoc(form.unpack) or "") if form.unpack is not None else ""
    return text.replace("\n\n", " ").replace("\n", " ").replace("``", "`").rstrip(".")


def _unread() -> Iterator[str]:
    yield "| file | instead |"
    yield "|---|---|"
    for other in UNREAD:
        yield f"| {other.name} | {other.instead} |"
    yield f"| {', '.join(BINARY.values())} | convert it to CSV or JSON lines |"


if __name__ == "__main__":
    sys.exit(keep(OUT, page(), __doc__))
