"""What tests of the queue level share: vLLM's own schedulers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.vllm_plugin import real_scheduler as real


@pytest.fixture
def schedulers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Builds schedulers from a configuration and options; they are shut down with the test."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    built: list[Any] = []

    def make(gimbal: dict[str, Any] | None, **options: Any) -> Any:
        built.append(real.build(tmp_path, gimbal, **options))
        return built[-1]

    yield make
    for scheduler in built:
        scheduler.shutdown()
