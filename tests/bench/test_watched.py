"""Who looks at the server of `benchmarks/watched.py`, and what it makes of its blocks."""

from __future__ import annotations

import asyncio
import importlib
import json
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from benchmarks import watched
from gimbal.bench.client import ClientResult
from gimbal.records.schema import RunInfo
from gimbal.records.store import RunWriter
from tests.bench.a_request import REQUEST


class _Server(ThreadingHTTPServer):
    """Answers the page's question with the next number; `asked` holds every path."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: list[str] = []
        self.enough = threading.Event()
        self.broken = False


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        body = json.dumps({"taken": len(self.server.asked), "every_s": 0.01}).encode()
        self.send_response(500 if self.server.broken else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        if self.server.broken or len(self.server.asked) >= 4:
            self.server.enough.set()

    def log_message(self, *_: Any) -> None:
        """Says nothing."""


@pytest.fixture
def server() -> Iterator[_Server]:
    with _Server() as found:
        threading.Thread(target=found.serve_forever).start()
        yield found
        found.shutdown()


def test_somebody_looks_while_they_are_to(server: _Server) -> None:
    with watched.Watcher(f"http://127.0.0.1:{server.server_port}") as watcher:
        assert not server.enough.wait(0.05), "nobody was to look yet"
        watcher.looks.set()
        assert server.enough.wait(10)
        watcher.looks.clear()
    assert server.asked[:3] == [
        "/metrics",
        "/gimbal/view?span=fine&after=-1",
        "/gimbal/view?span=fine&after=2",
    ]
    assert watcher.replies["/metrics"] == 1
    assert watcher.replies["/gimbal/view"] == len(server.asked) - 1


def test_nobody_looked_is_an_error(server: _Server) -> None:
    def look() -> None:
        with watched.Watcher(f"http://127.0.0.1:{server.server_port}") as watcher:
            watcher.looks.set()
            assert server.enough.wait(10)

    server.broken = True
    with pytest.raises(OSError, match="500"):
        look()


def test_blocks_come_in_pairs_by_chance() -> None:
    blocks = watched.plan_blocks(40, 4.0, seed=3)
    assert blocks == watched.plan_blocks(40, 4.0, seed=3)
    assert [block.begin_s for block in blocks] == [4.0 * i for i in range(80)]
    firsts = [first.watched for first, second in zip(blocks[::2], blocks[1::2], strict=True)]
    assert [second.watched for second in blocks[1::2]] == [not first for first in firsts]
    assert 10 < sum(firsts) < 30


def test_a_block_has_what_was_sent_and_answered_in_it() -> None:
    block = watched.Block(0, True, 4.0, 8.0)
    assert block.has(ClientResult("", 5.0, token_times_s=[5.1, 8.0]))
    assert not block.has(ClientResult("", 5.0, token_times_s=[5.1, 8.1]))
    assert not block.has(ClientResult("", 4.1, token_times_s=[5.0, 6.0])), "it settles first"
    assert not block.has(ClientResult("", 5.0))


def test_switches_at_the_beginning_of_every_block() -> None:
    seen: list[tuple[bool, float]] = []
    blocks = watched.plan_blocks(2, 0.05, seed=1)
    started_s = time.perf_counter()
    asyncio.run(
        watched.follow(blocks, lambda on: seen.append((on, time.perf_counter() - started_s)))
    )
    assert [on for on, _ in seen] == [block.watched for block in blocks]
    assert all(at_s >= block.begin_s for (_, at_s), block in zip(seen, blocks, strict=True))


def test_a_server_records_only_aloud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(watched.__file__).parents[1]
    monkeypatch.syspath_prepend(root / "tests/live/on_import")
    quiet_records = importlib.import_module("benchmarks.quiet_records.sitecustomize")
    for module, (owner, *names) in quiet_records.WRITERS.items():
        found = getattr(importlib.import_module(module), owner)
        assert all(callable(getattr(found, name)) for name in names)
    monkeypatch.setattr(quiet_records, "LOOK_S", -1.0)
    file = tmp_path / "quiet"
    write = quiet_records.only_aloud(lambda text: text, quiet_records.Quiet(file))
    assert write("a") == "a"
    file.touch()
    assert write("b") is None
    file.unlink()
    assert write("c") == "c"


def test_modules_are_changed_as_they_are_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(Path(watched.__file__).parents[1] / "tests/live/on_import")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    (tmp_path / "changed_here.py").write_text("VALUE = 1\n")
    on_import = importlib.import_module("changed_on_import")
    on_import.change_on_import({"changed_here": lambda module: setattr(module, "VALUE", 2)})
    assert importlib.import_module("changed_here").VALUE == 2
    monkeypatch.delitem(sys.modules, "changed_here")


def test_parts_are_put_together(tmp_path: Path) -> None:
    """Three pairs and two; watched, a first token takes a tenth longer in every one."""
    for part, pairs in enumerate((3, 2)):
        info = RunInfo("bench", (), 0, pairs, {}, {"off": {}, "on": {}}, {}, {})
        with RunWriter(tmp_path / str(part), info) as writer:
            for pair in range(pairs):
                for name, first_s in (("off", 0.1), ("on", 0.11)):
                    own = {"request_id": f"{name}{pair}", "arm": name, "repeat": pair}
                    writer.write([replace(REQUEST, **own, first_token_s=first_s)])
            writer.write([replace(REQUEST, request_id="odd", arm="off", repeat=pairs)])
    table = watched.table([tmp_path / "0", tmp_path / "1"])
    assert table.title == "5 pairs of blocks"
    cells = [list(column.cells) for column in table.columns]
    assert cells[0][0] == "TTFT mean"
    assert cells[3][0] == "1.1000 [1.1000, 1.1000]"
    assert cells[3][3] == "0.9500 [0.9500, 0.9500]"
    assert table.caption == "completed: off: 5 of 5, on: 5 of 5"


def test_a_run_is_written_by_its_blocks(tmp_path: Path) -> None:
    blocks = watched.plan_blocks(1, 4.0, seed=0)
    results = [
        ClientResult(f"r{i}", 1.0 + i, "ok", [1.1 + i, 1.5 + i], output_tokens=2) for i in range(7)
    ]
    args = type("Options", (), {"seed": 0})
    watched.write(tmp_path, args, blocks, watched.steady(1.0, 7.0), results)
    runs = watched.runs_of([tmp_path])
    arms = ["on" if block.watched else "off" for block in blocks]
    assert [r.request_id for r in runs[arms[0]][0]] == ["r0", "r1", "r2"], "r3 ends in the next"
    assert [r.request_id for r in runs[arms[1]][0]] == ["r4", "r5", "r6"]
