"""``gimbal top`` on the recorded status of a server, and on what is none."""

from __future__ import annotations

import copy
import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console

from gimbal.commands.top import command
from gimbal.core.errors import InputError
from gimbal.core.snapshot import Field
from gimbal.report.live_status import draw, read_status

RECORDED = json.loads(Path(__file__).with_name("status.json").read_text())


class Site(BaseHTTPRequestHandler):
    status, content, asked = 200, b"", 0

    def do_GET(self) -> None:
        type(self).asked += 1
        self.send_response(self.status if self.path == "/gimbal/status" else 404)
        self.end_headers()
        self.wfile.write(self.content)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(Site, "content", json.dumps(RECORDED).encode())
    monkeypatch.setattr(Site, "asked", 0)
    httpd = HTTPServer(("127.0.0.1", 0), Site)
    thread = threading.Thread(target=httpd.serve_forever, args=(0.05,))
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    thread.join()
    httpd.server_close()


def changed(**values: Any) -> dict[str, Any]:
    """The recorded status with other values of engine 1, or of the whole."""
    document = copy.deepcopy(RECORDED)
    for name, value in values.items():
        (document if name in document else document["engines"][1])[name] = value
    return document


def picture(document: Any, rows: int = 9, **options: Any) -> str:
    console = Console(width=160, markup=False, record=True, file=io.StringIO())
    console.print(draw(read_status(document), "http://x", rows, **options))
    return console.export_text()


def row_of(engine: int, text: str) -> list[str]:
    [row] = [line.split() for line in text.splitlines() if line.split()[:1] == [str(engine)]]
    return row


def test_the_recorded_server(url: str) -> None:
    result = CliRunner().invoke(command, [f"{url}/v1", "--once"])
    assert result.exit_code == 0, result.output
    head = result.output.splitlines()[0]
    assert all(f"{level} on" in head for level in ("dispatch", "queue", "placement", "feedback"))
    engine = RECORDED["engines"][1]
    row = row_of(1, result.output)
    assert row[1:3] == [f"{engine[f'{k}_requests']:,.0f}" for k in ("waiting", "running")]
    assert engine["step_time_us"] > 0.0
    assert row[6] == f"{engine['step_time_us'] / 1e3:,.1f}"
    sent = sum(entry["count"] for entry in RECORDED["dispatch"]["decisions"])
    assert sent > 0
    assert f"sent {sent:,} requests" in result.output
    assert "!" not in result.output


def test_the_record_has_every_column_of_today() -> None:
    assert {field.name.lower() for field in Field} <= set(RECORDED["engines"][0])


def test_json_is_one_object(url: str) -> None:
    result = CliRunner().invoke(command, [url, "--json"])
    found = json.loads(result.stdout)
    assert found["version"] == RECORDED["version"]
    assert found["levels"]["dispatch"] == "on"
    assert [e["engine"] for e in found["engines"]] == [0, 1]
    assert found["engines"][0]["kv_blocks_total"] == RECORDED["engines"][0]["kv_blocks_total"]
    assert found["trouble"] == []


def test_trouble_comes_first() -> None:
    off = changed(dispatch=RECORDED["dispatch"] | {"switched_itself_off": True})
    off["dispatch"]["fallbacks"] = {"error": 20}
    first = picture(off).splitlines()
    assert "dispatch switched itself off" in first[0]
    assert "! level dispatch has switched itself off" in first[2]
    assert "! dispatch fell back 20 times: error" in first[3]
    ended = picture(changed(placement_off=1.0)).splitlines()
    assert "placement switched itself off" in ended[0]
    assert "! level placement has switched itself off in engine 1; the log says why" in ended[2]
    silent = picture(changed(age_us=5e6, idle=0.0, waiting_requests=3, queue_fallbacks=2))
    assert "! engine 1 has work and said nothing for 5 s" in silent
    assert "! queue fell back to vLLM 2 times" in silent
    idle = changed(age_us=5e6, waiting_requests=0, running_requests=0, unacknowledged_requests=0)
    assert "said nothing" not in picture(idle)
    assert "said nothing" not in picture(changed(age_us=5e6, waiting_requests=3, idle=1.0))
    assert "! engine 1 has published nothing yet" in picture(changed(age_us=None))


def test_a_level_that_cannot_act_is_named() -> None:
    assert "! level dispatch cannot act here" in picture(changed(dispatch=None))
    unheard = changed(config={"levels": ["placement"]}, dispatch=None, age_us=None)
    assert "!" not in picture(unheard)


def test_an_operator_may_have_switched_levels_off() -> None:
    head = picture(changed(control={"levels": ["queue"]})).splitlines()[0]
    assert "dispatch off" in head
    assert "queue on" in head


def test_64_engines_are_cut_to_the_screen_by_backlog() -> None:
    document = copy.deepcopy(RECORDED)
    first = document["engines"][0]
    document["engines"] = [
        first | {"engine": i, "waiting_prefill_tokens": 1000 * (i == 50) + i} for i in range(64)
    ]
    text = picture(document, rows=5)
    first_words = [line.split()[:2] for line in text.splitlines()]
    shown = [words[0] for words in first_words if words[0].isdecimal() and words[1] != "engines:"]
    assert shown == ["50", "63", "62", "61", "60"]
    assert "64 engines" in text


def test_what_rearrangements_did() -> None:
    values = {"proposals": 9, "commits": 4, "received_experts": 120, "stall_us": 2.5e6}
    gains = {"predicted_gain_us": 30.0, "realized_loss_us": 4.0, "balance": 0.91}
    text = picture(changed(**{f"placement_{k}": v for k, v in (values | gains).items()}))
    assert "experts: 4 of 9 proposals committed, 120 moved, stall 2.50 s, balance 0.910" in text
    assert "predicted 30.0 us, realized -4.0 us" in text


def test_requests_per_second_are_those_since_the_last_picture() -> None:
    decisions = [dict(entry) for entry in RECORDED["dispatch"]["decisions"]]
    decisions[0]["count"] += 30
    later = changed(dispatch=RECORDED["dispatch"] | {"decisions": decisions})
    assert "(15.0/s)" in picture(later, before=(read_status(RECORDED), 2.0))


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([], "no status of Gimbal"),
        ({}, "no status of Gimbal"),
        ({"version": "1", "config": None, "engines": []}, "Gimbal is not enabled"),
    ],
)
def test_what_is_no_status_is_refused(document: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_status(document)


def test_nothing_that_a_server_says_is_trusted() -> None:
    nasty = {
        "version": "\x1b[2J" + "x" * 10_000,
        "config": {"levels": "queue"},
        "control": {"levels": 3},
        "policies": {"dispatch": "a\nb[red]"},
        "engines": [3, None, {"engine": "nan", "kv_blocks_total": 0, "step_time_us": []}, {}],
        "dispatch": {"decisions": [3, {"count": "x"}], "fallbacks": {"error": True}},
    }
    text = picture(nasty)
    assert "\x1b" not in text
    assert "a b[red]" in text
    assert len(read_status(nasty).version) <= 300


@pytest.mark.parametrize(
    ("status", "content", "message"),
    [
        (404, b"no", "no Gimbal routes"),
        (503, b'{"error": "the signal board cannot be read"}', "the signal board cannot be read"),
        (200, b"<html>", "not JSON"),
        (200, b"[]", "no status of Gimbal"),
    ],
)
def test_a_server_that_has_no_status(
    url: str, monkeypatch: pytest.MonkeyPatch, status: int, content: bytes, message: str
) -> None:
    monkeypatch.setattr(Site, "status", status)
    monkeypatch.setattr(Site, "content", content)
    result = CliRunner().invoke(command, [url, "--once"])
    assert isinstance(result.exception, InputError)
    assert str(result.exception).startswith(url)
    assert message in str(result.exception)


def test_a_terminal_is_refreshed_until_ctrl_c_and_outlives_the_server(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = pty.openpty()
    top = subprocess.Popen(
        [sys.executable, "-m", "gimbal.cli", "top", url, "--interval", "0.05"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=_owns_its_terminal,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "160", "LINES": "40"},
    )
    os.close(theirs)
    try:
        seen = _read_until(ours, b"requests (")  # the second picture has a rate
        monkeypatch.setattr(Site, "status", 503)
        seen += _read_until(ours, b"HTTP 503")
        os.write(ours, b"\x03")
        seen += _read_until(ours, b"\x1b[?1049l")  # the terminal is given back
        assert top.wait(timeout=60) == 0
        assert Site.asked > 2
        assert b"Traceback" not in seen
    finally:
        top.kill()
        top.wait()
        os.close(ours)


def _owns_its_terminal() -> None:
    import fcntl
    import termios

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # whoever has started these tests may ignore it
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def _read_until(terminal: int, part: bytes) -> bytes:
    seen, end = b"", time.monotonic() + 120
    while part not in seen:
        assert time.monotonic() < end, seen
        if select.select([terminal], [], [], 1.0)[0]:
            try:
                seen += os.read(terminal, 1 << 16)
            except OSError:  # the other side is gone
                assert part in seen, seen
    return seen
