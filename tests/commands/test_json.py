"""`--json` over every command: standard output is one JSON value and nothing else.

Processes of their own, so that what a library prints when it is imported counts.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner

from gimbal.bench.echo import EchoOptions, echo_server
from gimbal.bench.endpoint import Endpoint
from gimbal.cli import gimbal
from gimbal.core.contracts import IntArray
from reproduction.matrix import Matrix
from reproduction.regimes import Regime
from tests.commands.leaves import LEAVES

TRACE = '{"arrival_s": %s, "prompt_tokens": 60, "output_tokens": 4}\n'
WORKLOAD = "--trace trace.jsonl --requests 20"
SIMULATE = f"simulate {WORKLOAD} --cluster h100x4-paper --settle 0 --jobs 1"
DEMO = "model demo --out demo --layers 2 --experts 16 --top-k 2 --hidden 128 --vocab 512"
# Command line without ``--json``, a key of what it prints.
ROWS = [
    (SIMULATE, "arms"),
    ("simulate --list", "clusters"),
    ("goodput --list", "scenarios"),
    ("bench --list", "arms"),
    (f"bench --url {{echo}} {WORKLOAD} --rate 50 --model-dir model --warm-up 0", "client"),
    (f"bench {WORKLOAD} --plot-trace plot.svg", "plot"),
    ("place --routing routing.npz --ranks 4 --exact --exact-layers 1 --time-limit 1 --plot p.svg",
     "exact"),
    ("stats routing.npz", "experts"),
    ("top {status}", "engines"),
    ("calibrate --estimate h100 --model-dir model", "estimated"),
    ("calibrate --from-steps steps --model-dir model --plot fit.svg", "coefficients_us"),
    ("report run", "page"),
    (DEMO, "bytes"),
    ("config", "levels"),
]  # fmt: skip
SLOW_ROWS = [
    (f"goodput {WORKLOAD} --cluster h100x4-paper --slo ttft_ms=9 --loads 0.5,1 --jobs 1", "arms"),
    ("bench --check-client", "tokens_per_s"),
    ("model stats demo --prompts 2 --prompt-tokens 8 --continuation-tokens 2", "layers"),
    ("doctor", "checks"),
]
BEFORE = {"report": f"{SIMULATE} --out run", "model stats": DEMO}
"""What makes the files that a row reads."""
IN_PROCESS = {"reproduce live", "reproduce paper", "reproduce regimes", "reproduce goodput"}


def test_every_command_has_it() -> None:
    # A server's output is its log.
    without = {path for path, command in LEAVES.items() if not has_json(command)}
    assert without == {"serve"}
    lines = [line for line, _ in (*ROWS, *SLOW_ROWS)]
    named = {path for path in LEAVES for line in lines if line.startswith(path)}
    assert named == set(LEAVES) - without - IN_PROCESS


def has_json(command: click.Command) -> bool:
    return any("--json" in parameter.opts for parameter in command.params)


def parsed(text: str, key: str) -> Any:
    value = json.loads(text, parse_constant=pytest.fail)
    assert key in value
    return value


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the commands of `ROWS` read."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIMBAL_DATA", str(tmp_path))
    (tmp_path / "trace.jsonl").write_text("".join(TRACE % (i * 0.02) for i in range(40)))
    (tmp_path / "burstgpt").mkdir()
    rows = "".join(f"{i},40,4\n" for i in range(20))
    text = f"Timestamp,Request tokens,Response tokens\n{rows}"
    (tmp_path / "burstgpt" / "BurstGPT_1.csv").write_text(text)
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "routing.npz", counts=np.floor(rng.pareto(1.5, (4, 3, 16)) * 1000))
    sizes = ("hidden_size", "moe_intermediate_size", "num_attention_heads", "num_hidden_layers")
    config = dict.fromkeys(sizes, 64) | {"num_experts": 8, "num_experts_per_tok": 2}
    for name in ("model", "echo"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config | {"vocab_size": 300}))
    (tmp_path / "steps").mkdir()
    prefills = rng.integers(1, 512, (600, 2)) * (rng.random((600, 2)) < 0.4)
    decodes = rng.integers(0, 40, (600, 2))
    for engine in range(2):
        steps = [step(i, engine, prefills, decodes) for i in range(600)]
        text = "".join(json.dumps(row) + "\n" for row in steps)
        (tmp_path / "steps" / f"steps-{engine}.jsonl").write_text(text)
    return tmp_path


def step(index: int, engine: int, prefills: IntArray, decodes: IntArray) -> dict[str, Any]:
    """A record of a machine that takes 5 ms, and 40 us for every token of both engines."""
    prefill, requests = int(prefills[index, engine]), int(decodes[index, engine])
    return {
        "time_s": index * 0.1,
        "engine": engine,
        "duration_us": 5000.0 + 40.0 * float(prefills[index].sum() + decodes[index].sum()),
        "prefill_tokens": prefill,
        "decode_requests": requests,
        "waiting_requests": 0,
        "waiting_prefill_tokens": 0,
        "kv_usage": 0.1,
        "context_tokens": 300 * requests,
        "prefill_pairs": prefill * prefill / 2,
    }


class Status(BaseHTTPRequestHandler):
    content = Path(__file__).with_name("status.json").read_bytes()

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.content)

    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def status_server() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Status) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def output(line: str, *more: str) -> str:
    command = [sys.executable, "-m", "gimbal.cli", *line.split(), *more]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0 or line == "doctor", done.stderr
    assert "\x1b" not in done.stderr, "a bar, and no terminal"
    return done.stdout


@pytest.mark.parametrize(
    ("line", "key"), [*ROWS, *(pytest.param(*row, marks=pytest.mark.slow) for row in SLOW_ROWS)]
)
@pytest.mark.usefixtures("here")
def test_json_is_all_there_is(line: str, key: str) -> None:
    for option, module in (
        ("--plot", "matplotlib"),
        ("--exact", "highspy"),
        ("demo", "tokenizers"),
    ):
        if option in line:
            pytest.importorskip(module)
    for path, before in BEFORE.items():
        if line.startswith(path):
            output(before)
    with echo_server(EchoOptions(tick_s=0.01)) as echo, status_server() as status:
        text = output(line.format(echo=echo, status=status), "--json")
    parsed(text, key)


def invoke(capfd: pytest.CaptureFixture[str], *words: str) -> str:
    """Standard output of a command in this process, and of the processes that it starts."""
    capfd.readouterr()
    done = CliRunner().invoke(gimbal, ["reproduce", *words, "--out", "out", "--json"])
    assert done.exit_code == 0, done.output
    return capfd.readouterr().out + done.stdout


@pytest.mark.slow
@pytest.mark.usefixtures("here")
def test_json_of_reproductions(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    trace = "trace.jsonl"
    small = dataclasses.replace(Matrix(), seeds=1, requests=20, trace=trace, capacity_requests=40)
    small = dataclasses.replace(small, distributions=("random",), loads=(0.9,))
    monkeypatch.setattr("reproduction.matrix.QUICK", small)
    parsed(invoke(capfd, "paper", "--quick", "--scenarios", "today", "--jobs", "1"), "code")
    regimes = {"small": Regime("small", trace, "h100x4-paper")}
    monkeypatch.setattr("reproduction.regimes.REGIMES", regimes)
    size = ("--requests", "20", "--seeds", "1", "--loads", "0.5", "--jobs", "1")
    parsed(invoke(capfd, "regimes", *size), "groups")
    parsed(invoke(capfd, "goodput", *size, "--slo", "ttft_ms=9"), "regimes")


@pytest.mark.usefixtures("here")
def test_json_of_a_live_reproduction(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with echo_server(EchoOptions(tick_s=0.01)) as url:
        server = SimpleNamespace(endpoint=Endpoint(url))
        monkeypatch.setattr("gimbal.bench.servers.ServerPool.get", lambda pool, spec: server)
        size = ("--arms", "vllm", "--capacity", "20", "--duration", "1")
        parsed(invoke(capfd, "live", *size), "live-0.9")
