"""Steps on disk, and a disk that takes none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gimbal.core.snapshot import ROW_WIDTH
from gimbal.vllm_plugin.engine.step_log import BUFFER_BYTES, StepLog


def write(log: StepLog, count: int) -> None:
    for step in range(count):
        log.write(np.zeros(ROW_WIDTH), 1000.0 * step, 500.0, 1, 1.0, 2)


def said(caplog: pytest.LogCaptureFixture) -> int:
    return len([r for r in caplog.records if "steps not recorded" in r.message])


def test_every_step_is_a_line(tmp_path: Path) -> None:
    log = StepLog(tmp_path / "deep", 3)
    write(log, 5)
    log.flush()
    rows = [json.loads(t) for t in (tmp_path / "deep" / "steps-3.jsonl").read_text().splitlines()]
    assert [row["decode_requests"] for row in rows] == [2] * 5
    assert log.lost == 0


def test_a_full_disk_is_logged_once_and_costs_only_what_does_not_fit(
    tmp_path: Path, full_disk: Callable[[int | None], None], caplog: pytest.LogCaptureFixture
) -> None:
    log = StepLog(tmp_path, 0)
    full_disk(10_000)
    write(log, 2_000)
    log.flush()
    lost = log.lost
    assert 0 < lost < 2_000
    assert said(caplog) == 1
    full_disk(100 * BUFFER_BYTES)
    write(log, 10)
    log.close()
    text = (tmp_path / "steps-0.jsonl").read_text()
    assert len([json.loads(line) for line in text.splitlines()]) == 2_010 - lost
    assert log.lost == lost


def test_a_folder_that_cannot_be_made_costs_the_records_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    log = StepLog(tmp_path / "file", 0)
    write(log, 3)
    log.flush()
    log.close()
    assert log.lost == 3
    assert said(caplog) == 1
