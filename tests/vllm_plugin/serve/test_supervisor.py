"""The supervisor with a stand-in for the server, run as a process of its own."""

from __future__ import annotations

import math
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from gimbal.bench.servers import free_port
from gimbal.vllm_plugin.serve.family import Ended
from gimbal.vllm_plugin.serve.supervisor import Supervisor

pytest.importorskip("psutil")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux only")

RUN = """
import dataclasses, sys
from rich.console import Console
from gimbal.core.config import GimbalConfig
from gimbal.vllm_plugin.serve.address import Address
from gimbal.vllm_plugin.serve.plan import ServePlan
from gimbal.vllm_plugin.serve import head, supervisor
from gimbal.vllm_plugin.serve.supervisor import Supervisor

class Plan(ServePlan):
    __slots__ = ()
    command = property(lambda self: [sys.executable, "-u", "-c", self.arguments[0]])

headless = sys.argv[1].startswith("# headless")
engines = 2 if sys.argv[1].startswith("# headless 2") else 1
address = None if headless else Address("127.0.0.1", int(sys.argv[2]))
plan = Plan((sys.argv[1],), {}, GimbalConfig(), address, "m", headless, engines)
if "127.0.0.77" in sys.argv[1]:
    plan = dataclasses.replace(plan, head="127.0.0.77")
head.LOOK_S, head.GONE_S = 0.1, 1.0
supervisor.LOST_GRACE_S = 1.0
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


def start(server: str, port: int = 1, *before: str) -> subprocess.Popen[str]:
    server = server.replace("PORT", str(port))
    command = [*before, sys.executable, "-u", "-c", RUN, server, str(port)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Under nohup it is ignored, and stays so.
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
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
    # Of this plan vLLM's load balancing of experts is off.
    assert "; levels: dispatch, queue, feedback; idle: placement; " in text
    assert re.search(r"watch it: http://\S+/gimbal\n", text)
    assert "stopped; no process and no shared memory left" in rest


@pytest.mark.parametrize(
    ("server", "code", "message"),
    [
        ("raise SystemExit(2)", 2, "ended while importing vLLM: exit code 2"),
        ("print('(EngineCore) x'); raise SystemExit(7)", 1, "while starting the engines: exit"),
        ("import os; os.kill(os.getpid(), 9)", 1, "killed by SIGKILL (out of memory?)"),
        ("import os; os.kill(os.getpid(), 7)", 1, "killed by SIGBUS (is /dev/shm full?)"),
        ("pass", 1, "ended while importing vLLM: exit code 0"),
    ],
)
def test_a_server_that_ends_by_itself_is_an_error(server: str, code: int, message: str) -> None:
    process = start(server)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == code
    assert message in errors
    assert re.fullmatch(r"gimbal: API server \(process \d+\) ended [^\n]*\n", errors)


@pytest.mark.parametrize("code", [0, 1])
def test_a_headless_node_whose_head_has_gone_is_an_error(code: int) -> None:
    process = start(f"# headless\nprint('GPU KV cache size: x'); raise SystemExit({code})")
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    ended = rf"ended while reserving KV cache: exit code {code}"
    assert re.fullmatch(rf"gimbal: \S+ \S+ \(process \d+\) {ended}\n", errors), errors


def test_a_headless_node_says_ready_once_its_engines_have_started() -> None:
    line = "print('init engine (profile, create kv cache, warmup model) took 1 s', flush=True)"
    process = start(
        f"# headless 2\nimport time\n{line}; time.sleep(1); print('late', flush=True)\n{line}\n"
        "time.sleep(60)"
    )
    assert process.stdout is not None
    said = []
    while not said or "ready" not in said[-1]:
        said.append(process.stdout.readline())
        assert said[-1], said
    assert re.match(r"gimbal: ready in \d+\.\d s for its head \(model m; levels: ", said[-1])
    assert "late\n" in said
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 0, errors


def test_an_idle_headless_node_ends_when_its_head_has_closed_all_connections() -> None:
    with socket.socket() as head:
        head.bind(("127.0.0.77", 0))
        head.listen()
        process = start(
            "# headless\nimport socket, time\n"
            f"kept = socket.create_connection({head.getsockname()})\n"
            "print('init engine (profile) took 1 s', flush=True); time.sleep(60)"
        )
        there, _ = head.accept()
        time.sleep(3.0)
        assert process.poll() is None, "as long as it is connected"
    there.close()
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    how = r"ended while running: no connection to its head at 127\.0\.0\.77 for 10 s"
    assert re.fullmatch(rf"gimbal: headless node \(process \d+\) {how}\n", errors), errors


def test_a_headless_node_that_is_asked_to_stop_is_none() -> None:
    process = start("# headless\nimport time; print('KV cache size', flush=True); time.sleep(60)")
    assert process.stdout is not None
    while "reserving KV cache" not in process.stdout.readline():
        pass
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 0, errors


# A server whose processes have vLLM's names. `worker` is what the worker of engine 1 does.
FAMILY = """
import multiprocessing, os, signal, sys, time
from gimbal.vllm_plugin.serve import family
family.note_children()
fork = multiprocessing.get_context("fork")
def sleep():
    time.sleep(60)
def engine():
    worker = fork.Process(target=sleep, name="VllmWorker-0")
    worker.start()
    PIDS["worker"] = worker.pid
    worker.join()
    os._exit(1)
PIDS = fork.Manager().dict()
children = {
    "engine": fork.Process(target=engine, name="EngineCore_DP1"),
    "coordinator": fork.Process(target=sleep, name="VLLM_DP_Coordinator"),
    "API server": fork.Process(target=sleep, name="ApiServer_2"),
    "helper": fork.Process(target=sleep, name="Process-7"),
}
for child in children.values():
    child.start()
if (zygote := os.fork()) == 0:
    sleep()
family.note_started(zygote, family.ZYGOTE)
while "worker" not in PIDS:
    time.sleep(0.01)
victim = {"zygote": zygote, "worker": PIDS["worker"]}
victim |= {name: child.pid for name, child in children.items()}
time.sleep(0.7)  # the supervisor reads twice a second who there is
os.kill(victim[VICTIM], signal.SIGSEGV)
if VICTIM == "helper":
    children["helper"].join()
    os.kill(os.getppid(), signal.SIGTERM)
    sleep()
if VICTIM in ("worker", "engine"):
    children["engine"].join()
    raise SystemExit(0 if VICTIM == "engine" else 5)
sleep()  # it does not notice
"""


@pytest.mark.parametrize(
    ("victim", "code", "message"),
    [
        ("engine", 1, r"engine 1 \(process \d+\) ended while .*: killed by SIGSEGV"),
        ("worker", 1, r"worker rank 0 of engine 1 \(process \d+\) ended .*: killed by SIGSEGV"),
        ("coordinator", 1, r"coordinator \(process \d+\) ended .*: killed by SIGSEGV"),
        ("API server", 1, r"API server 2 \(process \d+\) ended .*: killed by SIGSEGV"),
        ("zygote", 1, r"zygote \(process \d+\) ended while .*: killed by SIGSEGV"),
        ("helper", 0, ""),  # nothing a server needs
    ],
)
def test_the_process_that_ended_first_is_named(victim: str, code: int, message: str) -> None:
    process = start(FAMILY.replace("VICTIM", repr(victim)))
    output, errors = process.communicate(timeout=60)
    assert process.returncode == code, output + errors
    ours = [line for line in errors.splitlines() if line.startswith("gimbal:")]
    assert re.fullmatch(f"gimbal: {message}" if message else "", "\n".join(ours)), errors


def test_a_hang_up_that_is_to_be_ignored_is_ignored_by_all() -> None:
    process = start(HEALTHY, free_port(), "nohup")
    assert process.stdout is not None
    while "try: curl" not in (line := process.stdout.readline()):
        assert line, "the supervisor ended"
    (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for pid in (process.pid, int(child)):
        status = Path(f"/proc/{pid}/status").read_text()
        ignored = int(status.partition("SigIgn:")[2].split()[0], 16)
        assert ignored & 1 << signal.SIGHUP - 1
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=30)
    assert process.returncode == 0, errors
    assert "stopped; no process" in output


@pytest.mark.parametrize(
    ("lost_s", "code"),
    [
        (math.inf, 0),
        (9.5, 0),  # systemd's stop reaches every process at once
        (8.0, 1),
    ],
)
def test_a_stop_of_a_server_that_is_going_down_does_not_hide_why(lost_s: float, code: int) -> None:
    supervisor = Supervisor(None, verbose=False, console=Console())  # type: ignore[arg-type]
    supervisor._stopping, supervisor._stop_s, supervisor._lost_s = True, 10.0, lost_s
    lost = None if lost_s == math.inf else Ended("coordinator", 7, -9)
    child = SimpleNamespace(pid=1, poll=lambda: None)
    family = SimpleNamespace(first_failure=lambda code: lost)
    assert supervisor._outcome(SimpleNamespace(child=child, family=family)) == (
        code,
        lost if code else None,
    )


def test_another_program_on_the_port_is_not_the_server() -> None:
    port = free_port()
    other = subprocess.Popen([sys.executable, "-c", HEALTHY.replace("PORT", str(port))])
    try:
        wait_until_open(port)
        process = start("import time; time.sleep(3); raise SystemExit(1)", port)
        output, errors = process.communicate(timeout=60)
        assert process.returncode == 1
        assert "ready in" not in output
        assert "ended while importing vLLM: exit code 1" in errors
    finally:
        other.kill()
        other.wait()


def wait_until_open(port: int) -> None:
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)


def test_what_is_said_last_has_a_line_of_its_own() -> None:
    process = start("import sys; sys.stdout.write('no newline'); raise SystemExit(3)")
    output, _ = process.communicate(timeout=30)
    assert output.endswith("no newline\n")


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
import os, signal
from rich.console import Console
from pathlib import Path
from gimbal.vllm_plugin.serve.family import Family
from gimbal.vllm_plugin.serve.supervisor import Supervisor
family = Family(os.getpid(), Path("none"))
supervisor = Supervisor(None, verbose=False, console=Console())
signal.signal(signal.SIGALRM, supervisor._stop)
for turn in range(20_000):
    supervisor._stopping = False
    signal.setitimer(signal.ITIMER_REAL, (1 + turn % 40) * 1e-6)
    while not supervisor._stopping:
        family.wait(0.01, supervisor._awake)
    os.read(supervisor._awake, 1)
"""


def test_a_signal_at_any_moment_of_a_wait_is_no_deadlock() -> None:
    subprocess.run([sys.executable, "-c", WAITS_UNDER_SIGNALS], check=True, timeout=120)
