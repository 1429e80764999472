"""The supervisor with a stand-in for the server, run as a process of its own."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("psutil")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux only")

RUN = """
import dataclasses, sys
from rich.console import Console
from gimbal.core.config import GimbalConfig
from gimbal.vllm_plugin.serve.plan import ServePlan
from gimbal.vllm_plugin.serve.supervisor import Supervisor

class Plan(ServePlan):
    __slots__ = ()
    command = property(lambda self: [sys.executable, "-u", "-c", self.arguments[0]])

url = "http://127.0.0.1:" + sys.argv[2] + "/v1"
plan = Plan((sys.argv[1],), {}, GimbalConfig(), url, "m", False)
sys.exit(Supervisor(plan, verbose=False, console=Console(soft_wrap=True)).run())
"""
HEALTHY = """
import http.server, time
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def log_message(self, *_): pass
print("INFO non-default args: x")
time.sleep(1)
http.server.HTTPServer(("127.0.0.1", PORT), Handler).serve_forever()
"""


def start(server: str, port: int = 1) -> subprocess.Popen[str]:
    command = [sys.executable, "-u", "-c", RUN, server.replace("PORT", str(port)), str(port)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_phases_ready_line_and_a_clean_stop(number: int) -> None:
    process = start(HEALTHY, free_port())
    seen = []
    assert process.stdout is not None
    for line in process.stdout:
        seen.append(line)
        if "try: curl" in line:
            break
    process.send_signal(number)
    rest, errors = process.communicate(timeout=30)
    text = "".join(seen)
    assert process.returncode == 0, errors
    assert text.index("importing vLLM") < text.index("building the engine") < text.index("ready in")
    assert re.search(r"watch it: http://\S+/gimbal\n", text)
    assert "stopped; no process and no shared memory left" in rest


@pytest.mark.parametrize(
    ("server", "code", "message"),
    [
        ("raise SystemExit(2)", 2, "while importing vLLM (exit code 2)"),
        ("print('(EngineCore) x'); raise SystemExit(7)", 1, "while starting the engines (exit"),
        ("import os; os.kill(os.getpid(), 9)", 1, "(signal 9)"),
        ("pass", 1, "ended by itself while importing vLLM"),
    ],
)
def test_a_server_that_ends_by_itself_is_an_error(server: str, code: int, message: str) -> None:
    process = start(server)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == code
    assert message in errors


@pytest.mark.slow
def test_a_stop_before_ready_ends_a_server_that_hangs() -> None:
    hang = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up'); time.sleep(99)"
    process = start(hang)
    assert process.stdout is not None
    while "up" not in process.stdout.readline():
        pass
    (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    start_s = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 0
    assert time.monotonic() - start_s < 20
    assert not Path(f"/proc/{child}").exists()


WAITS_UNDER_SIGNALS = """
import queue, signal
from rich.console import Console
from gimbal.vllm_plugin.serve.supervisor import Supervisor
supervisor = Supervisor(None, verbose=False, console=Console())
signal.signal(signal.SIGALRM, supervisor._stop)
for turn in range(20_000):
    supervisor._stopping, supervisor._wake = False, queue.SimpleQueue()
    signal.setitimer(signal.ITIMER_REAL, (1 + turn % 40) * 1e-6)
    while not supervisor._stopped_within(0.01):
        pass
"""


def test_a_signal_at_any_moment_of_a_wait_is_no_deadlock() -> None:
    subprocess.run([sys.executable, "-c", WAITS_UNDER_SIGNALS], check=True, timeout=30)
