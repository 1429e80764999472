"""Whatever a file holds: a reader returns finite values in range, or one line that names the file.

Random bytes, and good files with bytes changed, cut, doubled and put in.
"""

from __future__ import annotations

import io
import json
import math
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gimbal.core.errors import InputError
from gimbal.core.numbers import MOST_SECONDS, MOST_TOKENS
from gimbal.workloads import load_trace
from gimbal.workloads.prompts import read_vocabulary
from gimbal.workloads.routing import RoutingFile, read_routing, write_routing
from gimbal.workloads.trace import Trace
from tests.mutations import EXAMPLES, mutated, read_or_refuse
from tests.workloads.samples import SAMPLES, Sample


@st.composite
def archive(draw: st.DrawFn, good: bytes) -> bytes:
    """The zip file `good` with one of its members mutated, and a checksum that fits."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(good)) as old, zipfile.ZipFile(buffer, "w") as new:
        changed = draw(st.sampled_from(old.namelist()))
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, draw(mutated(content)) if name == changed else content)
    return buffer.getvalue()


def check_trace(trace: Trace) -> None:
    assert len(trace)
    for request in trace.requests:
        assert math.isfinite(request.arrival_s)
        assert 0.0 <= request.arrival_s <= MOST_SECONDS * 2
        for tokens in (request.prompt_tokens, request.output_tokens):
            assert type(tokens) is int
            assert 1 <= tokens <= MOST_TOKENS
        assert all(0 <= block < 2**64 for block in request.prefix_blocks)
    assert trace.arrivals_s.shape == trace.prompt_tokens.shape


@settings(EXAMPLES, max_examples=600)
@given(sample=st.sampled_from(SAMPLES), data=st.data())
def test_traces(tmp_path: Path, sample: Sample, data: st.DataObject) -> None:
    content = data.draw(mutated(sample.text.encode()))
    trace = read_or_refuse(lambda path: load_trace(str(path)), tmp_path / "trace", content)
    if trace is not None:
        check_trace(trace)


@EXAMPLES
@given(content=st.binary(max_size=200))
def test_no_traces(tmp_path: Path, content: bytes) -> None:
    trace = read_or_refuse(lambda path: load_trace(str(path)), tmp_path / "trace", content)
    if trace is not None:
        check_trace(trace)


def routing_files() -> dict[str, bytes]:
    counts = np.arange(24.0).reshape(2, 3, 4)
    recording = RoutingFile(
        counts,
        active=counts / 30,
        decode=counts / 2,
        physical_to_logical=np.array([[0, 1, 2, 3]] * 3, dtype=np.int32),
        steps=7,
        metadata={"ranks": 2, "model": "demo"},
    )
    ours, plain, choices, single = (io.BytesIO() for _ in range(4))
    write_routing(ours, recording)
    np.savez(plain, counts=counts, steps=np.asarray(3), metadata=np.asarray('{"ranks": 2}'))
    np.savez(choices, topk_idx=np.array([[[0, 1]], [[1, 2]]], dtype=np.uint8), seq_len=[1, 2])
    np.save(single, np.array([[[3, 0], [0, 1]]]))
    return {
        "ours.npz": ours.getvalue(),
        "plain.npz": plain.getvalue(),
        "choices.npz": choices.getvalue(),
        "single.npy": single.getvalue(),
    }


def torch_files() -> dict[str, bytes]:
    torch = pytest.importorskip("torch")
    stat, detail, per_pass = io.BytesIO(), io.BytesIO(), io.BytesIO()
    torch.save({"logical_count": torch.ones(2, 2, 3, dtype=torch.int32)}, stat)
    ids = torch.tensor([[[0, 3]], [[1, -1]]])
    table = torch.tensor([[0, 1, 2, 2], [2, 1, 0, 0]])
    records = [{"rank": rank, "topk_ids_of_layer": ids} for rank in (1, 0, 1)]
    torch.save({"records": records, "last_physical_to_logical_map": table}, detail)
    passes = [{"rank": rank, "global_physical_count": table} for rank in (1, 0)]
    torch.save({"records": passes, "last_physical_to_logical_map": table}, per_pass)
    files = {"stat.pt": stat, "detail.pt": detail, "per_pass.pt": per_pass}
    return {name: file.getvalue() for name, file in files.items()}


def check_recording(recording: RoutingFile) -> None:
    counts = recording.counts
    assert counts.ndim == 3
    assert counts.size
    assert np.isfinite(counts).all()
    assert (counts >= 0).all()
    assert recording.steps >= 1
    json.dumps(recording.metadata, allow_nan=False)
    for array in (recording.active, recording.decode):
        assert array is None or (array.shape == counts.shape and np.isfinite(array).all())


@pytest.mark.parametrize("name", ["ours.npz", "plain.npz", "choices.npz", "single.npy"])
@EXAMPLES
@given(data=st.data())
def test_recordings(tmp_path: Path, name: str, data: st.DataObject) -> None:
    good = routing_files()[name]
    kinds = [archive(good)] if name.endswith(".npz") else [st.binary(max_size=200)]
    content = data.draw(st.one_of(mutated(good), *kinds))
    recording = read_or_refuse(read_routing, tmp_path / name, content)
    if recording is not None:
        check_recording(recording)


@pytest.mark.parametrize("name", ["stat.pt", "detail.pt", "per_pass.pt"])
@EXAMPLES
@given(data=st.data())
def test_torch_files(tmp_path: Path, name: str, data: st.DataObject) -> None:
    good = torch_files()[name]
    content = data.draw(st.one_of(mutated(good), archive(good)))
    recording = read_or_refuse(read_routing, tmp_path / name, content)
    if recording is not None:
        check_recording(recording)


NUMBERS = st.one_of(st.integers(-(2**63), 2**63 - 1), st.integers(-3, 9))
ARRAYS = st.one_of(
    st.lists(NUMBERS, max_size=3).map(np.asarray),
    st.tuples(
        st.sampled_from(["f8", "i8", "u1", "u8", "c16", "?", "U3", "M8[s]", "f2"]),
        st.lists(st.integers(0, 3), max_size=4),
        st.sampled_from([0, 1, -1, 250]),
    ).map(lambda t: np.full(t[1], t[2]).astype(t[0])),
    st.lists(st.floats(), min_size=6, max_size=6).map(lambda x: np.reshape(x, (1, 2, 3))),
    st.sampled_from(['{"ranks": 2}', "{", "[" * 2000, "NaN", "3"]).map(np.asarray),
)
FIELDS = ("counts", "topk_idx", "active", "decode", "physical_to_logical", "steps", "metadata",
          "seq_len")  # fmt: skip


@EXAMPLES
@given(fields=st.dictionaries(st.sampled_from(FIELDS), ARRAYS, max_size=5))
def test_archives_of_any_arrays(tmp_path: Path, fields: dict[str, np.ndarray]) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **fields)
    recording = read_or_refuse(read_routing, tmp_path / "any.npz", buffer.getvalue())
    if recording is not None:
        check_recording(recording)


TENSOR_PARTS = st.tuples(
    st.integers(-2, 2**40),
    st.lists(st.integers(-2, 2**33), max_size=3).map(tuple),
    st.lists(st.integers(-2, 2**33), max_size=3).map(tuple),
)


@EXAMPLES
@given(parts=TENSOR_PARTS)
def test_tensors_do_not_reach_beyond_their_storage(
    tmp_path: Path, parts: tuple[int, tuple[int, ...], tuple[int, ...]]
) -> None:
    """A size or stride that a file names is never taken on trust."""
    from gimbal.workloads.torch_archive import _Reader

    reader = _Reader(b"", None, "", tmp_path)  # type: ignore[arg-type]
    storage = np.arange(100.0)
    try:
        array = reader._tensor(storage, *parts)
    except (InputError, ValueError, MemoryError):
        return
    assert np.isin(array, storage).all()


VOCABULARIES = {
    "gimbal_demo.json": b'{"domains": {"code": {"token_ids": [5, 6, 7], "weights": [0.5, 1, 2]}}}',
    "config.json": b'{"vocab_size": 300}',
    "tokenizer.json": b'{"added_tokens": [{"id": 3, "content": "x"}, {"id": 5}]}',
    "tokenizer_config.json": b'{"added_tokens_decoder": {"7": {"content": "y"}}}',
}


@pytest.mark.parametrize("name", VOCABULARIES)
@EXAMPLES
@given(data=st.data())
def test_vocabularies(tmp_path: Path, name: str, data: st.DataObject) -> None:
    (tmp_path / "config.json").write_bytes(VOCABULARIES["config.json"])
    content = data.draw(st.one_of(st.binary(max_size=200), mutated(VOCABULARIES[name])))
    vocabulary = read_or_refuse(lambda p: read_vocabulary(p.parent), tmp_path / name, content)
    if vocabulary is not None:
        for pool in vocabulary.domains.values():
            assert len(pool.ids) == len(pool.cumulative) > 0
            assert np.isfinite(pool.cumulative).all()
            assert pool.cumulative[-1] == pytest.approx(1.0)
            assert (pool.ids >= 0).all()
