"""Which requests go through a proxy, and whose certificate counts."""

from __future__ import annotations

import http.server
import ssl
import threading
from collections.abc import Iterator
from urllib.error import URLError

import pytest

from gimbal.core import web

NOWHERE = "http://127.0.0.1:9"


@pytest.fixture(autouse=True)
def proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy for everything that is not excepted; nobody listens there."""
    for name in ("no_proxy", "NO_PROXY", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", NOWHERE)
    monkeypatch.setenv("https_proxy", "127.0.0.1:9")


@pytest.fixture
def url() -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"here")

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("localhost", True),
        ("a.localhost", True),
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("0.0.0.0", True),
        ("::1", True),
        ("::", True),
        ("10.0.0.1", False),
        ("example.org", False),
        ("127.0.0.1.example.org", False),
        ("", False),
    ],
)
def test_this_machine_by_name(host: str, local: bool) -> None:
    assert web.is_local(host) is local


def test_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    assert web.proxy_for("http://127.0.0.1:8000/v1") is None
    assert web.proxy_for("http://[::1]:8000/v1") is None
    assert web.proxy_for("http://example.org:8000/v1") == NOWHERE
    assert web.proxy_for("https://example.org/v1") == "http://127.0.0.1:9"
    monkeypatch.setenv("no_proxy", "example.org")
    assert web.proxy_for("http://example.org:8000/v1") is None


def test_certificates() -> None:
    assert web.tls_for("http://127.0.0.1:8000") is None
    local, far = web.tls_for("https://[::1]:8000"), web.tls_for("https://example.org")
    assert local is not None
    assert far is not None
    assert local.verify_mode == ssl.CERT_NONE
    assert far.verify_mode == ssl.CERT_REQUIRED


def test_a_server_of_this_machine_is_asked_directly(url: str) -> None:
    with web.open_url(url, 10.0) as reply:
        assert reply.read() == b"here"
    with pytest.raises(URLError):
        web.open_url("http://192.0.2.1/", 10.0)  # refused by the proxy that is not there
