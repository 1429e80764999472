"""Expert-parallel answers against one engine's, with real servers and live migrations.

The whole table is ``make correctness``; this is its float32 row for DP=2 EP=2 with redundant
experts and asynchronous EPLB, where the bounds are tight, and a broken map, which must be outside.

Both are vLLM's own servers, which the plugin is installed beside: it acts in the second, whose
configuration has a section for it, and in no other.
"""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path

import pytest

from tests.live.check.agreement import FLOAT32
from tests.live.check.correctness import (
    BREAKER,
    MIGRATIONS,
    STEP_INTERVAL,
    make_demo_model,
    measure,
    migrate,
    take_reference,
)
from tests.live.check.server import CheckedServer, ServerLayout

pytestmark = [pytest.mark.live, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_demo_model(tmp_path_factory.mktemp("demo"))


def gimbal_acts(server: CheckedServer) -> bool:
    """Whether the plugin says or counts anything; vLLM lists it as ``gimbal`` in any case."""
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=30) as reply:
        counts = "gimbal_" in reply.read().decode()
    assert counts == ("Gimbal" in server.log.read_text(errors="replace"))
    return counts


def test_migrated_experts_answer_like_one_engine(
    model: Path, tmp_path: Path, server_pool: object
) -> None:
    server_pool.stop()  # type: ignore[attr-defined]  # the shared demo server would slow these down
    vocabulary = int(json.loads((model / "config.json").read_text())["vocab_size"])
    one, log = ServerLayout(dtype="float32"), tmp_path / "one.log"
    with CheckedServer(model, one, log, plain_vllm=True, levels=None) as server:
        reference = take_reference(server, None, vocabulary)
        assert not gimbal_acts(server)
    layout = ServerLayout(2, 1, True, 4, True, STEP_INTERVAL, "float32")
    extra, log = ("--worker-extension-cls", BREAKER), tmp_path / "split.log"
    with CheckedServer(model, layout, log, extra, plain_vllm=True, levels="queue") as server:
        assert gimbal_acts(server)
        before = measure(server, reference, "before", FLOAT32)
        migrate(server, reference, MIGRATIONS)
        after = measure(server, reference, "after", FLOAT32)
        server.call_workers("gimbal_break_expert_map")
        broken = measure(server, reference, "broken", FLOAT32)
    assert before.ok, before
    assert after.ok, after
    assert after.migrations >= MIGRATIONS
    assert after.moved_slots > 0
    assert not broken.ok, broken
    assert broken.mean > 100 * FLOAT32.mean
