"""Names of packaged files, and paths: `gimbal.core.named_yaml`."""

from __future__ import annotations

from pathlib import Path

import pytest

from gimbal.core.cost.profile import load_profile
from gimbal.core.errors import InputError
from gimbal.core.named_yaml import read_named_yaml

CLUSTERS = ("cluster", "gimbal.sim", "clusters")


def test_a_name_a_file_and_neither(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("own.yaml", "own.json", "cpu-demo"):
        Path(name).write_text("{name: mine}")
    assert read_named_yaml(*CLUSTERS, "own.yaml") == {"name": "mine"}
    assert read_named_yaml(*CLUSTERS, "own.json") == {"name": "mine"}
    assert read_named_yaml(*CLUSTERS, "cpu-demo")["dp"] == 2  # the packaged one
    with pytest.raises(InputError, match=r"unknown cluster 'own' \(choose from cpu-demo"):
        read_named_yaml(*CLUSTERS, "own")
    with pytest.raises(InputError, match=r"profile own\.json"):
        load_profile("own.json")
