"""A KV connector that vLLM ships: one engine loads what the other has computed."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from gimbal.records.schema import StepRecord
from gimbal.records.store import read_records

pytestmark = pytest.mark.live

FOLDER = Path(tempfile.gettempdir()) / f"gimbal-kv-connector-{os.getpid()}"
FLAGS = (
    *("--additional-config", json.dumps({"gimbal": {"step_records": str(FOLDER / "steps")}})),
    "--kv-transfer-config",
    json.dumps(
        {
            "kv_connector": "ExampleConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"shared_storage_path": str(FOLDER / "kv")},
        }
    ),
)


def answer(server: Any, prompt: str, rank: int) -> str:
    body = {"model": server.model, "prompt": prompt, "max_tokens": 8, "temperature": 0.0}
    headers = {"Content-Type": "application/json", "X-data-parallel-rank": str(rank)}
    request = urllib.request.Request(
        f"{server.url}/completions", json.dumps(body | {"ignore_eos": True}).encode(), headers
    )
    with urllib.request.urlopen(request, timeout=120) as reply:
        return str(json.load(reply)["choices"][0]["text"])


@pytest.mark.server(*FLAGS)
def test_what_an_engine_loads_is_no_prefill(server: Any, server_pool: Any) -> None:
    try:
        prompt = "word " * 60
        computed, loaded = answer(server, prompt, 0), answer(server, prompt, 1)
        assert loaded == computed
        assert "KV connector ExampleConnector" in server.log.read_text(errors="replace")
        assert not server.metrics().get("gimbal_engine_signal_fallbacks_total", 0.0)
        server_pool.stop()  # the steps are on disk then
        records = [
            list(read_records(FOLDER / "steps" / f"steps-{rank}.jsonl", StepRecord))
            for rank in (0, 1)
        ]
        most = [max(record.prefill_tokens for record in steps) for steps in records]
        assert most[0] > 200
        assert 0 < most[1] < 64, "what no whole block holds"
    finally:
        shutil.rmtree(FOLDER, ignore_errors=True)
