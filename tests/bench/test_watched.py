"""Who looks at the server that `benchmarks/watched.py` measures, and what it makes of the turns."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from benchmarks import watched
from gimbal.records.schema import RequestRecord, RunInfo
from gimbal.records.store import RunWriter


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


def test_the_page_asks_for_what_is_new_and_metrics_are_scraped(server: _Server) -> None:
    replies: Counter[str] = Counter()
    with watched.watched(f"http://127.0.0.1:{server.server_port}", replies):
        assert server.enough.wait(10)
    first, scrape, *rest = server.asked
    assert first == "/gimbal/view?span=fine&after=-1"
    assert scrape == "/metrics"
    assert rest[:2] == ["/gimbal/view?span=fine&after=1", "/gimbal/view?span=fine&after=3"]
    assert replies == {"/gimbal/view": len(server.asked) - 1, "/metrics": 1}


def test_nobody_looked_is_an_error(server: _Server) -> None:
    server.broken = True
    with (
        pytest.raises(OSError, match="500"),
        watched.watched(f"http://127.0.0.1:{server.server_port}", Counter()),
    ):
        assert server.enough.wait(10)


def test_parts_are_put_together(tmp_path: Path) -> None:
    """Three turns and two; watched, a first token takes a tenth longer in every turn."""
    request = RequestRecord(
        request_id="",
        arm="",
        repeat=0,
        arrival_s=0.0,
        sent_s=0.0,
        prompt_tokens=8,
        output_tokens=3,
        expected_output_tokens=3,
        first_token_s=0.1,
        last_token_s=0.3,
        token_times_s=(0.1, 0.2, 0.3),
    )
    for part, repeats in enumerate((3, 2)):
        arms = {arm.name: arm.to_json() for arm in watched.arms_of(tmp_path)}
        rows = [{"arm": name, "repeat": k} for k in range(repeats) for name in arms]
        rows.append({"arm": "off", "repeat": repeats})  # whose counterpart was interrupted
        info = RunInfo("bench", (), 0, repeats, {}, arms, {}, {}, runs=tuple(rows))
        with RunWriter(tmp_path / str(part), info) as writer:
            for repeat in range(repeats):
                for name, first_s in (("off", 0.1), ("on", 0.11)):
                    own = {"request_id": f"{name}{repeat}", "arm": name, "repeat": repeat}
                    times = {"first_token_s": first_s, "token_times_s": (first_s, 0.2, 0.3)}
                    writer.write([replace(request, **own, **times)])
    table = watched.table([tmp_path / "0", tmp_path / "1"])
    assert table.title == "5 turns each, 2 pairs of servers"
    cells = [list(column.cells) for column in table.columns]
    assert cells[0][0] == "TTFT mean"
    assert cells[3][0] == "1.1000 [1.1000, 1.1000]"
    assert cells[3][3] == "0.9500 [0.9500, 0.9500]"
    assert table.caption == "completed: off: 5 of 5, on: 5 of 5"


def test_on_differs_from_off_in_records_alone(tmp_path: Path) -> None:
    off, on = (arm.gimbal_config() for arm in watched.arms_of(tmp_path))
    assert on.trace_records == on.step_records == on.placement.records == str(tmp_path / "records")
    quiet = replace(on, trace_records="", step_records="")
    assert replace(quiet, placement=replace(on.placement, records="")) == off
