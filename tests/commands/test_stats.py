"""``gimbal stats`` on recordings and on a stand-in for a server."""

import io
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
from click.testing import CliRunner

from gimbal.commands.stats import command, summarize
from gimbal.core.errors import InputError
from gimbal.workloads.routing import RoutingFile, read_routing, save_routing, write_routing

COUNTS = np.array([[[30.0, 10, 0, 0]], [[0.0, 0, 10, 30]]])
RECORDING = RoutingFile(
    COUNTS,
    decode=COUNTS / 2,
    physical_to_logical=np.array([[0, 1, 2, 3]]),
    steps=5,
    metadata={"ranks": 2, "ranks_per_source": 1, "committed": 3},
)


class Server(BaseHTTPRequestHandler):
    status, content = 200, b""

    def do_GET(self):
        self.send_response(self.status if self.path == "/gimbal/routing" else 404)
        self.end_headers()
        self.wfile.write(self.content)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    httpd = HTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=httpd.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    thread.join()
    httpd.server_close()


def test_summary_of_a_recording():
    summary = summarize(RECORDING)
    assert summary["expert_max_over_mean"] == {"0": 3.0, "1": 3.0}
    assert summary["divergence_bits"] == pytest.approx(1.0)  # nothing in common
    assert summary["local_share"] == 1.0
    assert summary["balance"] == 1.0
    assert summary["decode_share"] == 0.5


def test_idle_sources_do_not_count_as_different():
    summary = summarize(RoutingFile(np.concatenate([COUNTS[:1], np.zeros_like(COUNTS[:1])])))
    assert summary["divergence_bits"] is None
    assert list(summary["expert_max_over_mean"]) == ["0"]


def test_a_running_server_is_asked_and_saved(server, monkeypatch, tmp_path):
    buffer = io.BytesIO()
    write_routing(buffer, RECORDING)
    monkeypatch.setattr(Server, "content", buffer.getvalue())
    out = tmp_path / "live.npz"
    result = CliRunner().invoke(command, [server + "/v1", "--out", str(out), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["metadata"]["committed"] == 3
    np.testing.assert_array_equal(read_routing(out).counts, COUNTS)
    table = CliRunner().invoke(command, [server])
    assert "local share" in table.output


@pytest.mark.parametrize(
    ("status", "content", "message"),
    [
        (409, b'{"error": "the level placement is off"}', "the level placement is off"),
        (404, b'{"detail": "Not Found"}', "no Gimbal routes"),
        (500, b"oops", "HTTP 500"),
        (200, b"junk", "cannot be read"),
    ],
)
def test_a_server_that_gives_none_says_why(server, monkeypatch, status, content, message):
    monkeypatch.setattr(Server, "status", status)
    monkeypatch.setattr(Server, "content", content)
    result = CliRunner().invoke(command, [server])
    assert isinstance(result.exception, InputError)
    assert message in str(result.exception)


def test_files_and_wrong_ranks(tmp_path):
    path = tmp_path / "r.npz"
    save_routing(path, RECORDING)
    assert CliRunner().invoke(command, [str(path)]).exit_code == 0
    result = CliRunner().invoke(command, [str(path), "--ranks", "3"])
    assert "4 slots do not divide over 3 ranks" in str(result.exception)
