"""The byte scanner counts what a JSON reader would count, however the stream is cut."""

import json

from hypothesis import given, settings
from hypothesis import strategies as st

from gimbal.bench.sse import EventScanner


def stream(texts: list[str], done: bool = True) -> bytes:
    events = [
        {"id": "x", "choices": [{"index": 0, "text": t, "finish_reason": None}], "usage": None}
        for t in texts
    ]
    usage = {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": len(texts)}}
    lines = [json.dumps(e, separators=(",", ":")) for e in [*events, usage]]
    return "".join(f"data: {line}\n\n" for line in [*lines, *(["[DONE]"] if done else [])]).encode()


def scan(data: bytes, cuts: list[int]) -> tuple[int, EventScanner]:
    scanner, count, edges = EventScanner(), 0, [0, *sorted(c % (len(data) + 1) for c in cuts)]
    for start, end in zip(edges, [*edges[1:], len(data)], strict=True):
        count += scanner.feed(data[start:end])
    return count, scanner


tricky = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        ["data: {", '\n\ndata: {"', '"choices":[]', '"completion_tokens": 9', "[DONE]"]
    ),
)


@settings(max_examples=200)
@given(st.lists(tricky, max_size=8), st.lists(st.integers(0, 5000), max_size=12))
def test_counts_do_not_depend_on_cuts_or_text(texts: list[str], cuts: list[int]) -> None:
    count, scanner = scan(stream(texts), cuts)
    assert count == len(texts)
    assert scanner.done
    assert scanner.output_tokens == len(texts)
    assert scanner.error is None


def test_a_stream_that_breaks_off_is_not_done() -> None:
    count, scanner = scan(stream(["a", "b"], done=False), [])
    assert (count, scanner.done) == (2, False)


def test_an_error_event_is_kept_and_is_no_token() -> None:
    data = stream(["a"])[:-14] + b'data: {"error":{"message":"engine died"}}\n\n'
    count, scanner = scan(data, [40])
    assert count == 1
    assert scanner.error is not None
    assert "engine died" in scanner.error
