"""What is written comes back; what is not a run is refused by name."""

from pathlib import Path

import pytest

from gimbal.core.errors import InputError
from gimbal.records.environment import describe_environment
from gimbal.records.schema import (
    RebalanceRecord,
    RequestRecord,
    RunInfo,
)
from gimbal.records.store import RunReader, RunWriter

INFO = RunInfo("bench", ("bench", "--demo"), 3, 2, {"name": "t"}, {"vllm": {}}, {"cores": 2})
REQUEST = RequestRecord(
    "a-0", "vllm", 1, 0.5, 0.501, 30, 2, 2, 0.7, 0.8, (0.7, 0.8), 1, "s", "code", "ok", None, 4
)
REBALANCE = RebalanceRecord(1.0, True, "gain", 5.0, 6.0, None, 7.0, 4, 3, 1.5, 1.1, None, 0.4)


def test_every_record_round_trips(tmp_path: Path) -> None:
    with RunWriter(tmp_path / "run", INFO) as writer:
        writer.write([REQUEST, REQUEST])
        writer.write([REBALANCE])
        # Readable while the run goes on: nothing waits for close.
        assert len(RunReader(tmp_path / "run").requests()) == 2
    reader = RunReader(tmp_path / "run")
    assert reader.info() == INFO
    assert reader.requests() == [REQUEST, REQUEST]
    assert reader.rebalances() == [REBALANCE]


def test_info_is_replaced_and_absent_files_are_empty(tmp_path: Path) -> None:
    with RunWriter(tmp_path / "run", INFO) as writer:
        other = RunInfo("simulate", (), 0, 1, {}, {}, {}, result={"arms": {}})
        writer.write_info(other)
    reader = RunReader(tmp_path / "run")
    assert reader.info() == other
    assert reader.requests() == []


def test_a_run_is_never_overwritten(tmp_path: Path) -> None:
    RunWriter(tmp_path, INFO).close()
    with pytest.raises(InputError, match="holds a run already"):
        RunWriter(tmp_path, INFO)
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot be written"):
        RunWriter(tmp_path / "file" / "run", INFO)


def test_bad_files_are_named_with_their_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a run"):
        RunReader(tmp_path).info()
    with RunWriter(tmp_path / "run", INFO) as writer:
        writer.write([REBALANCE])
    path = tmp_path / "run" / "rebalances.jsonl"
    path.write_text(path.read_text() + "{broken\n")
    with pytest.raises(InputError, match=r"rebalances\.jsonl:2: not JSON"):
        RunReader(tmp_path / "run").rebalances()
    path.write_text('{"time_s": 1, "unknown": 2}\n')
    with pytest.raises(InputError, match=r"rebalances\.jsonl:1: .*committed"):
        RunReader(tmp_path / "run").rebalances()


def test_unknown_fields_are_ignored_and_new_ones_defaulted(tmp_path: Path) -> None:
    with RunWriter(tmp_path / "run", INFO) as writer:
        writer.write([REQUEST])
    path = tmp_path / "run" / "requests.jsonl"
    text = path.read_text().replace('"index":4', '"later_field":4')
    path.write_text(text)
    [record] = RunReader(tmp_path / "run").requests()
    assert record.index == 0
    assert record.token_times_s == (0.7, 0.8)


def test_environment_names_versions_and_cores() -> None:
    environment = describe_environment()
    assert environment["versions"]["numpy"]
    assert environment["cores"] >= 1
