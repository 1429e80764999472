"""Recordings of routing: ours comes back as written, others' are counted right."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from gimbal.core.errors import InputError
from gimbal.workloads.routing import RoutingFile, count_choices, read_routing, save_routing

DATA = Path(os.environ.get("GIMBAL_DATA", "../shared/data")) / "esft_deepseek_v2_lite"


def test_our_format_comes_back(tmp_path):
    counts = np.arange(12, dtype=float).reshape(2, 2, 3)
    written = RoutingFile(
        counts,
        active=counts / 12,
        physical_to_logical=np.array([[0, 1, 2, 0]] * 2),
        steps=7,
        metadata={"model": "demo"},
    )
    save_routing(tmp_path / "r.npz", written)
    back = read_routing(tmp_path / "r.npz")
    np.testing.assert_array_equal(back.counts, counts)
    np.testing.assert_array_equal(back.active, counts / 12)
    np.testing.assert_array_equal(back.physical_to_logical, [[0, 1, 2, 0]] * 2)
    assert back.decode is None
    assert back.metadata == {"model": "demo"}
    assert back.routing.steps == 7


def test_choices_are_counted_and_padding_is_not():
    choices = np.array([[[0, 1], [1, 2], [-1, -1]]])
    assert count_choices(choices, 4, "x").tolist() == [[1, 2, 1, 0]]


def test_files_become_sources(tmp_path):
    np.savez(tmp_path / "a.npz", topk_idx=np.array([[[0, 1]], [[1, 2]]], dtype=np.uint8))
    np.save(tmp_path / "b.npy", np.array([[[3, 0], [0, 1]]]))  # one token, two layers
    (tmp_path / "b.npy").rename(tmp_path / "b")  # a name says nothing
    both = read_routing([tmp_path / "a.npz", tmp_path / "b"])
    assert both.counts.tolist() == [
        [[1, 1, 0, 0], [0, 1, 1, 0]],
        [[1, 0, 0, 1], [1, 1, 0, 0]],
    ]
    assert both.metadata["sources"] == ["a", "b"]


def test_sglang_recordings(tmp_path):
    torch = pytest.importorskip("torch")
    count = torch.zeros(4, 2, 3, dtype=torch.int32)
    count[1, 0, 2] = 5
    count[2] = 1
    torch.save({"rank": 0, "logical_count": count}, tmp_path / "stat.pt")
    stat = read_routing(tmp_path / "stat.pt")
    assert stat.counts.tolist() == [[[1, 1, 6], [1, 1, 1]]]
    assert stat.steps == 2  # empty passes of the ring buffer do not count
    records = [
        {"rank": r, "topk_ids_of_layer": torch.tensor([[[0, 3]], [[1, -1]]])} for r in (1, 0, 1)
    ]
    table = torch.tensor([[0, 1, 2, 2], [2, 1, 0, 0]])
    torch.save({"records": records, "last_physical_to_logical_map": table}, tmp_path / "d.pt")
    detail = read_routing(tmp_path / "d.pt")
    assert detail.counts.tolist() == [[[1, 0, 1], [0, 1, 0]], [[2, 0, 2], [0, 2, 0]]]
    assert detail.steps == 2


def passes(*records, table=((0, 1, 2, 2), (2, 1, 0, 0))):
    torch = pytest.importorskip("torch")
    kept = [{name: torch.tensor(value) if name != "rank" else value for name, value in r.items()}
            for r in records]  # fmt: skip
    return {"records": kept, "last_physical_to_logical_map": torch.tensor(table)}


def test_sglang_counts_per_pass_are_of_physical_experts(tmp_path):
    torch = pytest.importorskip("torch")
    counts = [[1, 2, 3, 4], [5, 0, 0, 7]]
    saved = passes(
        {"rank": 1, "global_physical_count": counts},
        {"rank": 0, "global_physical_count": counts},
        {"rank": 1, "global_physical_count": counts},
    )
    torch.save(saved, tmp_path / "recording")  # whatever its name
    recording = read_routing(tmp_path / "recording")
    once = [[1, 2, 7], [7, 0, 5]]
    assert recording.counts.tolist() == [once, [[2 * n for n in row] for row in once]]
    assert recording.steps == 2
    saved = passes({"rank": 0, "global_physical_count": counts}, table=[[0, 1, -1, 1]] * 2)
    torch.save(saved, tmp_path / "recording")
    assert read_routing(tmp_path / "recording").counts.tolist() == [[[1, 6], [5, 7]]]


@pytest.mark.parametrize(
    ("record", "experts", "message"),
    [
        ({"topk_ids_of_layer": [[[0, 4]], [[1, 1]]]}, None, "id 4, but .* has 4 experts .a fused"),
        ({"global_physical_count": [[1, 2, 3]] * 2}, None, r"\(2, 3\) does not fit .* \(2, 4\)"),
        ({"global_physical_count": [[1, 2, 3, 4]] * 2}, 2, "of 2 experts"),
        ({"global_physical_count": [[1, -2, 3, 4]] * 2}, None, "negative"),
        ({"input_ids": [1]}, None, "not what is expected there .KeyError"),
    ],
)
def test_what_sglang_s_recorder_did_not_mean_is_named(tmp_path, record, experts, message):
    torch = pytest.importorskip("torch")
    torch.save(passes({"rank": 0, **record}), tmp_path / "r.pt")
    with pytest.raises(InputError, match=message):
        read_routing(tmp_path / "r.pt", experts)


def test_a_pickle_cannot_run_code(tmp_path):
    torch = pytest.importorskip("torch")

    class Evil:
        def __reduce__(self):
            return os.system, ("true",)

    torch.save({"logical_count": Evil()}, tmp_path / "evil.pt", pickle_module=pickle)
    with pytest.raises(InputError, match=r"refuses to load \w+\.system"):
        read_routing(tmp_path / "evil.pt")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.npz", None, "no such file"),
        ("x.npz", b"", "empty, expected a file of numpy"),
        ("x.npz", b"junk", "cannot be read: expected a file of numpy .* or of torch.save"),
        ("x.pt", b"PK junk", "no zip archive, or not all of one"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_routing(tmp_path / name)


def test_bad_contents_are_named(tmp_path):
    np.savez(tmp_path / "a.npz", other=np.zeros(1))
    with pytest.raises(InputError, match="neither counts nor topk_idx, but other"):
        read_routing(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", counts=np.zeros((2, 2)))
    with pytest.raises(InputError, match=r"counts: expected \[source, layer, expert\]"):
        read_routing(tmp_path / "b.npz")
    np.savez(tmp_path / "c.npz", topk_idx=np.full((1, 1, 1), 9))
    with pytest.raises(InputError, match="expert 9 is chosen, but there are 8"):
        read_routing(tmp_path / "c.npz", experts=8)


@pytest.mark.skipif(not DATA.exists(), reason="no recorded routing (GIMBAL_DATA)")
def test_recorded_routing_of_four_tasks():
    """Figures published with the recordings: 26 layers, 64 experts, top-6; divergence of tasks."""
    from gimbal.demo.calibrate import mean_divergence_bits

    tasks = ("intent", "summary", "law", "translation")
    four = read_routing([DATA / f"{t}.npz" for t in tasks], experts=64)
    assert four.counts.shape == (4, 26, 64)
    assert four.counts.sum(axis=2)[:, 0].tolist() == [6 * n for n in (8222, 8479, 8327, 8251)]
    shares = four.counts / four.counts.sum(axis=2, keepdims=True)
    bits = [mean_divergence_bits([s[layer] for s in shares]) for layer in range(26)]
    assert np.mean(bits) == pytest.approx(0.158, abs=0.002)
