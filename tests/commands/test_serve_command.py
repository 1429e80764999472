"""Bad input to ``gimbal serve``: one line on standard error, exit code 2, at once."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"
)


def gimbal(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gimbal.cli", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.fixture
def dense(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 8}))
    return str(tmp_path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["serve"], "no model given"),
        (["serve", "/no/such/model"], "no such model folder"),
        (["serve", "DENSE", "--enable-eplbb"], "--enable-eplbb: vLLM has no such flag"),
        (["serve", "DENSE", "-tp", "3"], "does not divide the model's 8 heads"),
        (["serve", "DENSE", "--levels", "dispach"], "did you mean 'dispatch'?"),
        (["serve", "--demo", "-dp", "3"], "do not divide over DP 3"),
        (["serve", "DENSE", "--gimbal-config", "/no/such.yaml"], "/no/such.yaml: no such file"),
        (["config", "--levels", "none,queue"], "unknown level 'none'"),
        (["doctor", "--vllm-source", "."], "no vLLM sources"),
    ],
)
def test_one_line_and_exit_code_2(dense: str, words: list[str], message: str) -> None:
    done = gimbal(*(dense if word == "DENSE" else word for word in words))
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert done.stderr.startswith("gimbal: ")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_a_dry_run_prints_the_command_and_starts_nothing(dense: str) -> None:
    done = gimbal("serve", dense, "--dry-run", "--port", "18622", "--levels", "queue", "-ep")
    assert done.returncode == 0, done.stderr
    assert "gimbal: " in done.stderr
    assert "its configuration names no experts, which --enable-expert-parallel needs" in done.stderr
    assert f"gimbal.vllm_plugin.serve.server {dense} --port 18622" in done.stdout
    assert '"levels": ["queue"]' in done.stdout
