"""A server's trace: what can be told from it, what cannot, and a disk that takes none."""

from __future__ import annotations

import logging
import stat
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest

from gimbal.core.errors import InputError
from gimbal.workloads import recorder as module
from gimbal.workloads.reader import read_trace
from gimbal.workloads.recorder import TraceRecorder

SALT = b"s" * 32
SHARED = list(range(9000, 9040))
Make = Callable[..., TraceRecorder]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Recorders of blocks of 16 tokens, each in a file of its own, all ended with the test."""
    made: list[TraceRecorder] = []
    numbers = count()

    def recorder(most_bytes: int = 1 << 20, salt: bytes = SALT) -> TraceRecorder:
        path = tmp_path / "deep" / f"trace-{next(numbers)}.jsonl"
        made.append(TraceRecorder(path, 16, most_bytes, salt))
        return made[-1]

    yield recorder
    for one in made:
        one.close()
        assert not one._thread.is_alive()


def serve(recorder: TraceRecorder, requests: int, prompt_tokens: int = 100) -> None:
    for number in range(requests):
        name, tokens = f"r{number}", [number, *range(prompt_tokens - 1)]
        recorder.arrived(name, float(number), prompt_tokens, tokens, None)
        recorder.generated(name, 7)
        recorder.finished([name])


def test_a_recording_is_a_trace(make: Make) -> None:
    recorder = make()
    recorder.arrived("a", 1000.25, 56, [*SHARED, *range(16)], "somebody")
    recorder.arrived("b", 1000.5, 5000, [*SHARED, *range(100, 5060)], "somebody")
    recorder.arrived("images", 1001.0, 300, None, None)
    for name, tokens in (("b", 1), ("images", 2), ("a", 1), ("b", 30), ("nobody's", 4)):
        recorder.generated(name, tokens)
    recorder.finished(["b", "nobody's"])
    recorder.finished(["images", "a"])
    recorder.close()
    trace = read_trace(recorder._path)
    a, b, images = trace.requests
    assert trace.prefix_block_tokens == 16
    assert [r.arrival_s for r in trace.requests] == [0.0, 0.25, 0.75]
    assert [r.prompt_tokens for r in trace.requests] == [56, 5000, 300]
    assert [r.output_tokens for r in trace.requests] == [1, 31, 2]
    assert (len(a.prefix_blocks), len(b.prefix_blocks), images.prefix_blocks) == (3, 312, ())
    same = [x == y for x, y in zip(a.prefix_blocks, b.prefix_blocks, strict=False)]
    assert same == [True, True, False], "40 tokens in common are two whole blocks"
    assert len({*b.prefix_blocks}) == 312
    assert a.session == b.session is not None
    assert images.session is None


def test_what_is_said_cannot_be_read_or_tried_out(make: Make) -> None:
    texts = []
    for salt in (SALT, b"t" * 32, SALT):
        recorder = make(salt=salt)
        recorder.arrived("secret-name", 5.0, 40, SHARED, "somebody")
        recorder.generated("secret-name", 3)
        recorder.finished(["secret-name"])
        recorder.close()
        assert stat.S_IMODE(recorder._path.stat().st_mode) == 0o600
        texts.append(recorder._path.read_text())
    mine, others, again = texts
    assert mine == again, "API servers of one server agree"
    assert mine != others
    for text in texts:
        assert "secret" not in text
        assert "somebody" not in text
        assert "9000" not in text


def test_who_generated_nothing_or_has_not_ended_is_not_in_it(make: Make) -> None:
    recorder = make()
    serve(recorder, 2)
    recorder.arrived("aborted", 5.0, 10, range(10), None)
    recorder.finished(["aborted"])
    recorder.arrived("goes on", 5.0, 10, range(10), None)
    recorder.generated("goes on", 4)
    recorder.close()
    assert len(read_trace(recorder._path)) == 2


def test_it_ends_at_its_size_and_says_so(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    recorder = make(most_bytes=5000)
    serve(recorder, 200)
    recorder.close()
    assert recorder.ended
    assert 4700 < recorder._path.stat().st_size <= 5000
    assert 20 < len(read_trace(recorder._path)) < 200
    assert [r.levelno for r in caplog.records] == [logging.ERROR]
    assert "ends: it has" in caplog.text
    recorder.arrived("late", 300.0, 10, range(10), None)
    assert not recorder._open, "nothing is kept for a file that has ended"


def test_a_full_disk_ends_it_with_whole_lines(
    make: Make, full_disk: Callable[[int | None], None], caplog: pytest.LogCaptureFixture
) -> None:
    recorder = make()
    full_disk(10_000)
    serve(recorder, 500)
    recorder.close()
    full_disk(None)
    assert recorder.ended
    assert recorder._path.read_bytes().endswith(b"}\n")
    assert 9_000 < recorder._path.stat().st_size <= 10_000
    assert len(read_trace(recorder._path)) > 20
    assert caplog.text.count("serving goes on") == 1


def test_a_folder_that_cannot_be_made(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    recorder = TraceRecorder(tmp_path / "file" / "trace.jsonl", 16, 1 << 20, SALT)
    serve(recorder, 3)
    recorder.close()
    assert caplog.text.count("serving goes on") == 1


def test_a_prompt_that_is_none_costs_its_own_names(make: Make) -> None:
    recorder = make()
    recorder.arrived("odd", 0.0, 32, [1 << 70] * 32, None)
    recorder.generated("odd", 1)
    recorder.finished(["odd"])
    serve(recorder, 1)
    recorder.close()
    assert [len(r.prefix_blocks) for r in read_trace(recorder._path).requests] == [0, 6]


def test_who_falls_behind_or_is_never_told_the_end_is_bounded(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = make()
    monkeypatch.setattr(module, "MOST_BEHIND_TOKENS", -1)
    serve(recorder, 3)
    monkeypatch.undo()
    monkeypatch.setattr(module, "MOST_OPEN", 2)
    for number in range(4):
        recorder.arrived(f"lost{number}", 9.0, 10, range(10), None)
    assert list(recorder._open) == ["lost2", "lost3"]
    recorder.close()
    assert recorder.left_out == 5
    assert "5 requests left out" in caplog.text


def test_traces_of_several_api_servers_are_put_together(make: Make, tmp_path: Path) -> None:
    texts = []
    for _ in range(2):
        recorder = make()
        serve(recorder, 3)
        recorder.close()
        texts.append(recorder._path.read_text())
    together = tmp_path / "together.jsonl"
    together.write_text("".join(texts))
    trace = read_trace(together)
    assert [r.arrival_s for r in trace.requests] == [0.0, 0.0, 1.0, 1.0, 2.0, 2.0]
    assert trace.requests[0].prefix_blocks == trace.requests[1].prefix_blocks
    together.write_text(texts[0] + texts[1].replace("16", "32", 1))
    with pytest.raises(InputError, match="prefix_block_tokens=32: expected 16, as above"):
        read_trace(together)
