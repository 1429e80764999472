"""What `benchmarks/routers.py` makes of its turns, and what the router is started with."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import routers
from gimbal.records.schema import RunInfo
from gimbal.records.store import RunWriter
from tests.bench.a_request import REQUEST


def test_turns_that_all_have_run_are_compared(tmp_path: Path) -> None:
    """Asked for loads, a first token comes in half the time; the last turn was interrupted."""
    info = RunInfo("bench", (), 0, 6, {}, {name: {} for name in routers.ARMS}, {}, {})
    with RunWriter(tmp_path, info) as writer:
        for repeat in range(6):
            for name in list(routers.ARMS)[: 4 if repeat < 5 else 2]:
                first_s = 0.05 if name == routers.OURS else 0.1
                own = {"request_id": f"{name}{repeat}", "arm": name, "repeat": repeat}
                writer.write([replace(REQUEST, **own, first_token_s=first_s)])
    table = routers.table(tmp_path)
    assert table.title == "5 turns of each"
    rows = dict(zip(table.columns[0].cells, table.columns[1].cells, strict=True))
    assert rows[routers.BASE] == "100.0 ms"
    assert rows[routers.OURS] == "50.0 ms\n0.50 [0.50, 0.50]"
    assert list(table.columns[4].cells) == ["5 of 5"] * 4


@pytest.mark.parametrize(("arm", "interval"), [("round_robin", "3600"), ("gimbal-load", "1")])
def test_the_router_is_told_its_policy_and_how_often_to_ask(
    tmp_path: Path, arm: str, interval: str
) -> None:
    """Instead of the router a program that writes down what it is called with, and is ready."""
    program = tmp_path / "router"
    program.write_text(
        f"#!{sys.executable}\n"
        "import http.server, sys\n"
        f"open({str(tmp_path / 'said')!r}, 'w').write(' '.join(sys.argv[1:]))\n"
        "class Ready(http.server.BaseHTTPRequestHandler):\n"
        "    def do_GET(self):\n"
        "        self.send_response(200); self.end_headers()\n"
        "port = int(sys.argv[sys.argv.index('--port') + 1])\n"
        "http.server.HTTPServer(('127.0.0.1', port), Ready).serve_forever()\n"
    )
    program.chmod(0o700)
    servers = [SimpleNamespace(endpoint=SimpleNamespace(url=f"http://h{i}:1")) for i in range(2)]
    with routers.router(program, arm, servers, tmp_path) as endpoint:  # type: ignore[arg-type]
        said = (tmp_path / "said").read_text()
        assert endpoint.healthy()
    assert f"--policy {routers.ARMS[arm][0]} " in said
    assert f"--worker-startup-check-interval {interval} " in said
    assert said.endswith("--worker-urls http://h0:1 http://h1:1")
    assert not endpoint.healthy()
