"""Requests out of records that are not one request each: one small function per kind of file.

Each takes the records and a counter of tokens, and yields one row per request; None stands for a
request that failed when the file was written, and is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import zip_longest
from typing import Any

from gimbal.workloads.fields import Row, rows_of

Rows = Iterator[Row]
Requests = Iterator[Row | None]
Counter = Callable[[str], int]

PREFIX_TOKENS = 16
"""Of the blocks that a BLIS prefix group is cut into."""


def mooncake(records: Rows, count: Counter) -> Requests:
    """A turn with ``delay`` (ms) instead of ``timestamp`` comes so long after the one before it.

    AIPerf waits for the answer to that one first, which takes no time here.
    """
    sent: dict[Any, float] = {}
    for record in records:
        values, session = dict(record.values), record.text("session_id")
        if values.get("timestamp") is None and values.get("delay") is not None and session in sent:
            values["timestamp"] = sent[session] + record.seconds("delay")
        row = Row(record.path, record.line, values)
        if session is not None and values.get("timestamp") is not None:
            sent[session] = row.seconds("timestamp")
        yield row


def mooncake_texts(records: Rows, count: Counter) -> Requests:
    """AIPerf's ``text_input`` instead of ``input_length``."""
    for row in mooncake(records, count):
        if row is not None:
            yield _with(row, input_length=count(str(row.get("text_input"))))


def bailian(records: Rows, count: Counter) -> Requests:
    """A session is named by the first chat of the chain that ``parent_chat_id`` makes."""
    first: dict[object, object] = {}
    for row in records:
        chat, parent = row.text("chat_id"), row.text("parent_chat_id")
        first[chat] = first.get(parent, chat if parent in (None, "-1") else parent)
        yield _with(row, session=first[chat])


def blis(records: Rows, count: Counter) -> Requests:
    """A prefix group shares ``prefix_length`` tokens, which ``input_tokens`` does not count.

    Without a group ``server_input_tokens``, where it is known, has the chat template in it.
    """
    groups: dict[str, int] = {}
    for row in records:
        group = row.text("prefix_group")
        length = row.tokens("prefix_length") if group and row.text("prefix_length") else 0
        first = groups.setdefault(group or "", len(groups)) << 32
        blocks = list(range(first, first + length // PREFIX_TOKENS))
        prompt = row.tokens("input_tokens")
        if not group and row.text("server_input_tokens"):
            prompt = row.tokens("server_input_tokens") or prompt
        yield _with(row, prompt=prompt + length, blocks=blocks)


def blis_ids(records: Rows, count: Counter) -> Requests:
    """The first BLIS format: a length, or the list of token ids as text."""
    for row in records:
        lengths = {}
        for field in ("prefill_tokens", "decode_tokens"):
            text = str(row.get(field)).strip()
            ids = text.strip("[] ").replace(",", " ").split()
            lengths[field] = len(ids) if text.startswith("[") else text
        yield _with(row, **lengths)


def servegen(records: Rows, count: Counter) -> Requests:
    """Prompt tokens are the sum over kinds; images and audio are lists of them."""
    for row in records:
        data = row.get("data")
        if not isinstance(data, Mapping):
            raise row.fail("data", data, "a JSON object")
        parts = [
            part
            for name, value in data.items()
            if name.endswith("_tokens") and name != "output_tokens"
            for part in (value if isinstance(value, list) else [value])
        ]
        sizes = [Row(row.path, row.line, {"data": part}).tokens("data") for part in parts]
        yield _with(row, prompt=sum(sizes))


def serving_bench(records: Rows, count: Counter) -> Requests:
    """Results of vLLM and of SGLang: one list per quantity, empty answers being failures."""
    for record in records:
        names = [n for n in ("input_lens", "output_lens", "start_times") if n in record.values]
        columns = [record.array(name) for name in names]
        for number, values in enumerate(zip_longest(*columns), start=1):
            yield Row(record.path, number, dict(zip(names, values, strict=True)))


def guidellm(records: Rows, count: Counter) -> Requests:
    """A report: the requests of its benchmarks, which ran one after the other."""
    for record in records:
        for benchmark in rows_of(record.path, record.array("benchmarks")):
            for row in rows_of(record.path, benchmark.array("requests.successful")):
                start = row.find("request_start_time")
                yield _with(row, start_time=row.find("start_time") if start is None else start)
            for kind in ("incomplete", "errored"):
                if benchmark.find(f"requests.{kind}") is not None:
                    yield from [None] * len(benchmark.array(f"requests.{kind}"))


def aiperf_records(records: Rows, count: Counter) -> Requests:
    """Warm-up requests, failed and cancelled ones are left out."""
    for row in records:
        failed = row.find("error") or row.find("metadata.was_cancelled")
        warm_up = row.find("metadata.benchmark_phase") == "warmup"
        session = row.text("metadata.x_correlation_id") or row.text("metadata.conversation_id")
        yield None if failed or warm_up else _with(row, session=session)


def sharegpt(records: Rows, count: Counter) -> Requests:
    """Prompt and answer are the first two messages, as vLLM's benchmark takes them."""
    for row in records:
        messages = list(rows_of(row.path, row.array("conversations")))[:2]
        lengths = [count(str(m.text("value") or m.text("content") or "")) for m in messages]
        yield _with(row, prompt=lengths[0], output=lengths[1]) if len(lengths) == 2 else None


def prompts(records: Rows, count: Counter) -> Requests:
    """Texts with the length of the answer, as ``vllm bench --dataset-name custom`` reads."""
    for row in records:
        names = ("output_tokens", "output_tokens_count", "completion_tokens_count")
        output = next((n for n in names if row.text(n) is not None), names[0])
        yield _with(row, prompt=count(str(row.get("prompt"))), output=row.tokens(output))


def openai_batch(records: Rows, count: Counter) -> Requests:
    """Requests of a batch; the answer is as long as they allow."""
    for row in records:
        yield _chat(row, row.get("body"), count)


def openai_results(records: Rows, count: Counter) -> Requests:
    """Answers of a batch, with the usage that the server reports."""
    for row in records:
        yield None if row.find("error") or row.find("response.body.error") else row


def aiperf_inputs(records: Rows, count: Counter) -> Requests:
    """``inputs.json``: sessions with the body of each of their requests."""
    for session in records:
        for body in session.array("payloads"):
            yield _with(_chat(session, body, count), session=session.text("session_id"))


def _chat(row: Row, body: Any, count: Counter) -> Row:
    """Lengths of one request to ``/v1/chat/completions`` or ``/v1/completions``."""
    if not isinstance(body, Mapping):
        raise row.fail("body", body, "a JSON object")
    request = Row(row.path, row.line, body)
    limit = "max_completion_tokens" if body.get("max_completion_tokens") else "max_tokens"
    output = request.tokens(limit)
    if "messages" not in body:
        prompt = request.get("prompt")
        ids = isinstance(prompt, list) and all(type(token) is int for token in prompt)
        if not ids and not isinstance(prompt, str):
            raise request.fail("prompt", prompt, "a text or token ids")
        return _with(row, prompt=len(prompt) if ids else count(prompt), output=output)
    total = 0
    for message in rows_of(row.path, request.array("messages")):
        content = message.find("content") or ""
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        for part in rows_of(row.path, parts if isinstance(parts, list) else [parts]):
            if part.find("type") != "text":
                raise request.fail("content", part.find("type"), "parts of type 'text' alone")
            total += count(str(part.get("text"))) if part.find("text") else 0
    return _with(row, prompt=total, output=output)


def _with(row: Row, **values: Any) -> Row:
    return Row(row.path, row.line, {**row.values, **values})
