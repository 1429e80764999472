"""Whatever the files of a run hold: records as their types say, or one line that names the file."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gimbal.core.json_text import to_json
from gimbal.records.schema import (
    PlacementRecord,
    RebalanceRecord,
    RequestRecord,
    RunInfo,
    StepRecord,
)
from gimbal.records.store import RunReader, read_records
from tests.mutations import EXAMPLES, mutated, read_or_refuse

RECORDS = (
    RequestRecord(
        "a", "vllm", 1, 0.5, 0.501, 30, 2, 2, 0.7, 0.8, (0.7, 0.8), 1, "s", "code", "ok", None, 4
    ),
    StepRecord(12.5, 1, 900.0, 512, 7, 3, 4000, 0.25, 9000, 131_072.0),
    RebalanceRecord(1.0, True, "gain", 5.0, 6.0, None, 7.0, 4, 3, 1.5, 1.1, None, 0.4),
    PlacementRecord(2.0, True, ((1.5, 0.5),), ((0, 1),), ((1, 0),), "gimbal"),
)
INFO = RunInfo("bench", ("bench",), 3, 2, {"name": "t"}, {"vllm": {}}, {"cores": 2}, {"ttft_ms": 9})


def line_of(record: Any) -> bytes:
    return to_json(dataclasses.asdict(record)).encode() + b"\n"


def numbers(value: Any) -> list[float]:
    if isinstance(value, list | tuple):
        return [number for item in value for number in numbers(item)]
    return [value] if isinstance(value, int | float) else []


@pytest.mark.parametrize("record", RECORDS, ids=[type(r).__name__ for r in RECORDS])
@EXAMPLES
@given(data=st.data())
def test_records(tmp_path: Path, record: Any, data: st.DataObject) -> None:
    content = data.draw(st.one_of(st.binary(max_size=200), mutated(2 * line_of(record))))
    kind = type(record)
    found = read_or_refuse(lambda p: list(read_records(p, kind)), tmp_path / "x.jsonl", content)
    for one in found or []:
        assert type(one) is kind
        for number in numbers(list(dataclasses.asdict(one).values())):
            assert math.isfinite(number)
            assert abs(number) <= 2**53
        assert type(one)(**json.loads(line_of(one)))  # can be written again


@pytest.mark.parametrize("record", RECORDS, ids=[type(r).__name__ for r in RECORDS])
@EXAMPLES
@given(data=st.data())
def test_fields_of_other_types(tmp_path: Path, record: Any, data: st.DataObject) -> None:
    values = dataclasses.asdict(record)
    field = data.draw(st.sampled_from(sorted(values)))
    values[field] = data.draw(
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner),
            max_leaves=5,
        )
    )
    content = json.dumps(values).encode()
    kind = type(record)
    found = read_or_refuse(lambda p: list(read_records(p, kind)), tmp_path / "x.jsonl", content)
    if found is not None:
        assert all(map(math.isfinite, numbers(list(dataclasses.asdict(found[0]).values()))))


@EXAMPLES
@given(data=st.data())
def test_run_files(tmp_path: Path, data: st.DataObject) -> None:
    content = data.draw(st.one_of(st.binary(max_size=200), mutated(line_of(INFO))))
    info = read_or_refuse(
        lambda path: RunReader(path.parent).info(), tmp_path / "run.json", content
    )
    assert info is None or type(info) is RunInfo
