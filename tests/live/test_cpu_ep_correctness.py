"""Expert-parallel answers against one engine's, with real servers and live migrations.

The whole table is ``make correctness``; this is its float32 row for DP=2 EP=2 with redundant
experts and asynchronous EPLB, where the bounds are tight, and a broken map, which must be outside.
"""

from __future__ import annotations

import json
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


def test_migrated_experts_answer_like_one_engine(
    model: Path, tmp_path: Path, server_pool: object
) -> None:
    server_pool.stop()  # type: ignore[attr-defined]  # the shared demo server would slow these down
    vocabulary = int(json.loads((model / "config.json").read_text())["vocab_size"])
    with CheckedServer(model, ServerLayout(dtype="float32"), tmp_path / "one.log") as server:
        reference = take_reference(server, None, vocabulary)
    layout = ServerLayout(2, 1, True, 4, True, STEP_INTERVAL, "float32")
    extra = ("--worker-extension-cls", BREAKER)
    with CheckedServer(model, layout, tmp_path / "split.log", extra) as server:
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
