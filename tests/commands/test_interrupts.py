"""Ctrl-C over every command, as on a terminal: its process group gets SIGINT while it works,
which a bar says that it does.

Each ends with exit code 130 and one line, leaves no process and no file, and says how to go on
where that is possible. Work is endless here, so that how fast a machine is decides nothing.
`tests/live/test_lifecycle.py` does the same to servers.
"""

from __future__ import annotations

import errno
import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest

from gimbal.bench.echo import EchoOptions, echo_server
from gimbal.demo.model import make_demo_model
from gimbal.demo.sizes import DemoSizes
from gimbal.records.schema import RunInfo
from gimbal.records.store import RunWriter
from gimbal.vllm_plugin.serve.processes import descendants_of
from gimbal.vllm_plugin.serve.shared_memory import shared_memory_of
from tests.commands.leaves import LEAVES
from tests.left_over import gone

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

LIMIT_S = 300.0
"""For the first sign of work on the slowest machine, and for the end after Ctrl-C."""
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
TRACE = '{"arrival_s": %s, "prompt_tokens": 400, "output_tokens": %d}\n'
CONTINUES = ": the same command continues from out"
WORKLOAD = "--trace short.jsonl --cluster h100x4-paper --repeat 200 --requests 500 --jobs 2"

# Command line, the first sign of work on the terminal (or the pipe that it reads), how to go on.
# A bar is drawn ten times a second, so that of quick work nobody sees the first piece: {some}.
ROWS = [
    (f"simulate {WORKLOAD} --settle 0", "{some}/400", ""),
    (f"goodput {WORKLOAD} --slo ttft_ms=9", "capacity: ", ""),
    ("reproduce paper --jobs 2 --requests 10 --out out", "{some}/", CONTINUES),
    ("reproduce regimes --regimes burst --jobs 2 --seeds 1000 --out out", "capacity: ", CONTINUES),
    ("reproduce goodput --regimes burst --jobs 2 --seeds 1000 --out out", "capacity: ", CONTINUES),
    ("bench --url {echo} --trace trace.jsonl --model-dir model --warm-up 0 --out out",
     "0 done, 3 open", ": what has been measured is in out"),
    ("bench --check-client", "streaming from an echo server", ""),
    ("place --routing routing.npz --ranks 8 --slots-per-rank 5 --exact --time-limit 1e6",
     "/40", ""),
    ("stats {silent}", "reading http", ""),
    ("stats {silent} --json", "reading http", ""),
    ("top {silent}", "asking http", ""),
    ("calibrate --from-steps pipes --model-dir model", Path("pipes/steps-0.jsonl"), ""),
    ("report run", Path("run/requests.jsonl"), ""),
    ("config --gimbal-config pipe", Path("pipe"), ""),
    ("doctor --vllm-source pipes", Path("pipes/_version.py"), ""),
    ("model demo --out new --layers 500", "{some}/500", ""),
    ("model stats demo --prompts 10000 --prompt-tokens 8", "{some}/", ""),
]  # fmt: skip
LEFT = {
    "reproduce paper": {"out"},
    "reproduce regimes": {"out"},
    "reproduce goodput": {"out"},
    "bench --url": {"out"},
}
"""What a command keeps that can go on from it, or has measured something."""


def test_every_command_is_here() -> None:
    # A server's end has tests of its own, and so have the servers that `reproduce live` starts.
    named = {path for path in LEAVES for line, _, _ in ROWS if line.startswith(path)}
    assert named == set(LEAVES) - {"serve", "reproduce live"}


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A folder with what the commands of `ROWS` read."""
    for name, count, tokens in (("short", 20, 40), ("trace", 3, 20_000)):
        text = "".join(TRACE % (i * 0.02, tokens) for i in range(count))
        (tmp_path / f"{name}.jsonl").write_text(text)
    (tmp_path / "burstgpt").mkdir()
    rows = "".join(f"{i},40,4\n" for i in range(20))
    text = f"Timestamp,Request tokens,Response tokens\n{rows}"
    (tmp_path / "burstgpt" / "BurstGPT_1.csv").write_text(text)
    counts = np.floor(np.random.default_rng(0).pareto(1.5, (8, 40, 32)) * 1000)
    np.savez(tmp_path / "routing.npz", counts=counts)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({"vocab_size": 300}))
    (tmp_path / "pipes" / "v1").mkdir(parents=True)
    (tmp_path / "pipes" / "__init__.py").touch()
    result = {"arms": {}, "ratios": {}}
    RunWriter(tmp_path / "run", RunInfo("bench", (), 0, 1, {}, {}, {}, result=result)).close()
    for name in ("pipe", "pipes/steps-0.jsonl", "pipes/_version.py", "run/requests.jsonl"):
        os.mkfifo(tmp_path / name)
    (tmp_path / "temporary").mkdir()
    return tmp_path


@contextmanager
def silent_server() -> Iterator[str]:
    """It takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


class Terminal:
    """A command that has a terminal for its standard error, and a process group of its own."""

    def __init__(self, words: list[str], folder: Path) -> None:
        self.folder, self.text = folder, ""
        self._screen, theirs = pty.openpty()
        variables = {"TMPDIR": str(folder / "temporary"), "GIMBAL_DATA": str(folder)}
        with (folder / "temporary.out").open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "gimbal.cli", *words],
                cwd=folder,
                env=os.environ | variables | {"TERM": "xterm", "PYTHONUTF8": "1"},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=theirs,
                start_new_session=True,
                # Whoever has started these tests may ignore it.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )
        os.close(theirs)

    def wait_for(self, seen: Callable[[], bool]) -> None:
        """Reads the terminal until `seen`, or until the command has ended."""
        deadline_s = time.monotonic() + LIMIT_S
        while not seen() and self._read():
            assert time.monotonic() < deadline_s, f"still waiting: {self.text[-2000:]}"

    def _read(self) -> bool:
        """What there is within a tenth of a second; False once nobody can write any more."""
        if not select.select([self._screen], [], [], 0.1)[0]:
            return True
        try:
            new = os.read(self._screen, 1 << 16)
        except OSError:  # the last of them has closed it
            return False
        self.text += CONTROL.sub("", new.decode(errors="replace"))
        return bool(new)

    def close(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        os.close(self._screen)


def is_read(path: Path, writer: ExitStack) -> bool:
    """Whether a process reads the pipe; from then on it waits for more, which never comes."""
    try:
        end = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return False
        raise
    writer.callback(os.close, end)
    return True


def sleeps(pid: int) -> bool:
    """Whether the main thread of a process waits for something."""
    return psutil.Process(pid).status() == psutil.STATUS_SLEEPING


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"temporary.out"}


@pytest.mark.parametrize(("line", "sign", "how"), ROWS, ids=[row[0] for row in ROWS])
def test_ctrl_c(here: Path, line: str, sign: str | Path, how: str) -> None:
    if line.startswith("model stats"):
        pytest.importorskip("transformers")
        small = {"layers": 2, "top_k": 2, "hidden": 128, "moe_intermediate": 32, "heads": 2}
        make_demo_model(here / "demo", DemoSizes(**small, vocab=512))
    if "--exact" in line:
        pytest.importorskip("highspy")
    with ExitStack() as stack:
        echo = stack.enter_context(echo_server(EchoOptions(tick_s=0.05)))
        words = line.format(echo=echo, silent=stack.enter_context(silent_server())).split()
        before = files(here)
        terminal = Terminal(words, here)
        stack.callback(terminal.close)
        if isinstance(sign, Path):
            terminal.wait_for(lambda: is_read(here / sign, stack))
            # Between two system calls of one C function Python would note SIGINT and read on.
            terminal.wait_for(lambda: sleeps(terminal.process.pid))
        else:
            pattern = re.compile(re.escape(sign).replace(re.escape("{some}"), r"\b[1-9]\d*"))
            terminal.wait_for(lambda: pattern.search(terminal.text) is not None)
        process = terminal.process
        assert process.poll() is None, terminal.text
        family = descendants_of(process.pid)
        shared = shared_memory_of([process.pid, *family])
        os.killpg(process.pid, signal.SIGINT)
        terminal.wait_for(lambda: False)
        code = process.wait(LIMIT_S)
    assert code == 130, terminal.text
    lines = [part.strip() for part in terminal.text.replace("\r", "\n").splitlines()]
    said = [part for part in lines if part.startswith("gimbal: ")]
    assert said == [f"gimbal: interrupted{how}"] == [part for part in lines if part][-1:]
    assert "Traceback" not in terminal.text
    assert "━" in terminal.text or line.startswith("config")  # which takes no time
    assert gone(family, 20)
    assert not [path for path in shared if path.exists()]
    assert files(here) - before == next((LEFT[k] for k in LEFT if line.startswith(k)), set())
    left = files(here / "temporary")
    assert {name for name in left if not name.startswith("torchinductor_")} == set()  # its cache
