"""Benchmarks are run by hand: here they are imported, and the quick ones run once, untimed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "benchmarks").glob("*.py"))
IMPORT = """
import importlib.util, sys
for path in sys.argv[1:]:
    spec = importlib.util.spec_from_file_location("benchmark", path)
    sys.modules["benchmark"] = module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        if type(error).__name__ != "Skipped":  # without torch or vLLM some leave themselves out
            raise RuntimeError(path) from error
"""
QUICK = ["bench_queue.py", "bench_board.py", "bench_client.py"]
LONG = "not test_route and not test_500_streams"
"""Those import vLLM, or stream for six seconds."""


def run(*words: object) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_all_can_be_imported() -> None:
    assert len(FILES) > 15
    run("-c", IMPORT, *FILES)


@pytest.mark.slow
def test_the_quick_ones_run() -> None:
    files = [ROOT / "benchmarks" / name for name in QUICK]
    options = ["-q", "--benchmark-disable", "-p", "no:cacheprovider", "-k", LONG, "-m", "not scale"]
    assert " passed" in run("-m", "pytest", *options, *files)
