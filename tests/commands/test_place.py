"""`gimbal place`: its JSON, its files, and what it says to bad input."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from click.testing import CliRunner

from gimbal.commands.place import command
from gimbal.core.contracts import Topology
from gimbal.core.errors import InputError
from gimbal.core.placement import verify
from gimbal.workloads.routing import RoutingFile, save_routing


@pytest.fixture
def routing(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    path = tmp_path / "routing.npz"
    np.savez(path, counts=np.floor(rng.pareto(1.5, (4, 3, 16)) * 1000))
    return path


def run(*args: object) -> str:
    result = CliRunner().invoke(command, [str(a) for a in args], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_json_has_the_promised_fields(routing: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan.npz"
    text = run(
        "--routing", routing, "--ranks", 4, "--slots-per-rank", 5, "--next", routing,
        "--out", out, "--json",
    )  # fmt: skip
    report = json.loads(text)
    for side in ("before", "after"):
        terms = report["cost_us"][side]
        assert terms["total"] == pytest.approx(terms["load"] + terms["comm"] + terms["migration"])
    assert report["cost_us"]["after"]["total"] < report["cost_us"]["before"]["total"]
    assert report["lower_bound_us"] <= report["cost_us"]["after"]["total"]
    assert set(report["balance"]) == set(report["local_share"]) == {"before", "planned", "next"}
    assert report["balance"]["next"] == pytest.approx(report["balance"]["planned"])
    assert 0 < report["received_experts"] == report["moved_slots"] <= report["slots"] == 60
    placed = np.load(out)["physical_to_logical"]
    verify.check(placed, Topology(4, 5), 3, 16)
    again = run("--routing", routing, "--ranks", 4, "--current", out, "--json")
    # A new start may find a little more, but most of the plan stands.
    assert json.loads(again)["moved_slots"] < report["moved_slots"] / 3


MODEL = {
    "hidden_size": 2048,
    "num_hidden_layers": 3,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 16,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
}


def test_a_model_of_its_own_is_priced_by_its_bytes(routing: Path, tmp_path: Path) -> None:
    """With the shape of the profile's model nothing changes; with half its bytes a move is half."""

    def cost(**changed: object) -> dict:
        (tmp_path / "config.json").write_text(json.dumps({**MODEL, **changed}))
        text = run("--routing", routing, "--ranks", 4, "--model-dir", tmp_path, "--json")
        return json.loads(text)["cost_us"]

    bare = json.loads(run("--routing", routing, "--ranks", 4, "--json"))["cost_us"]
    assert cost() == bare
    assert cost(hidden_size=1024)["before"]["comm"] == pytest.approx(bare["before"]["comm"] / 2)
    fp8 = cost(quantization_config={"quant_method": "fp8"})
    assert fp8["before"]["load"] < bare["before"]["load"]
    assert fp8["before"]["comm"] == bare["before"]["comm"]


def test_a_model_that_was_not_recorded_is_refused(routing: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**MODEL, "num_experts": 64}))
    with pytest.raises(InputError, match="3 MoE layers of 64 experts, --routing has 3 of 16"):
        run("--routing", routing, "--ranks", 4, "--model-dir", tmp_path)


def test_other_engines_forms(routing: Path, tmp_path: Path) -> None:
    out = tmp_path / "map"
    run("--routing", routing, "--ranks", 4, "--out", out, "--format", "trtllm")
    assert yaml.safe_load(out.read_text())["num_slots"] == 16
    run("--routing", routing, "--ranks", 4, "--out", out, "--format", "sglang")
    assert len(json.loads(out.read_text())["physical_to_logical_map"]) == 3


def test_plot_and_table(routing: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "plan.png"
    text = run(
        "--routing", routing, "--ranks", 4, "--plot", out, "--backend", "allgather_reducescatter"
    )
    assert out.read_bytes()[:4] == b"\x89PNG"
    assert "communication term off" in text
    with pytest.raises(InputError, match=r"plan\.nothing: cannot be written"):
        run("--routing", routing, "--ranks", 4, "--plot", tmp_path / "plan.nothing")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--ranks", "3"], "16 slots do not divide over 3 ranks"),
        (["--ranks", "4", "--slots-per-rank", "3"], "cannot hold 16 experts"),
        (["--ranks", "2"], "4 sources, topology has 2"),
        (["--ranks", "4", "--placer", "gimball"], "did you mean 'gimbal'"),
        (["--ranks", "4", "--current", "absent.npz"], "absent.npz: no such file"),
    ],
)
def test_bad_input(routing: Path, args: list[str], message: str) -> None:
    with pytest.raises(InputError) as caught:
        run("--routing", routing, *args)
    assert message in str(caught.value)


def test_negative_counts_name_array_and_index(tmp_path: Path) -> None:
    counts = np.ones((4, 2, 8))
    counts[2, 1, 3] = -1
    path = tmp_path / "bad.npz"
    np.savez(path, counts=counts)
    with pytest.raises(InputError, match=r"bad.npz: counts\[2, 1, 3\]: negative"):
        run("--routing", path, "--ranks", 4)


def test_what_some_ranks_recorded_is_no_recording_of_all(tmp_path: Path) -> None:
    """Of each host of hybrid balancing, or of each rank behind an external balancer."""
    counts = np.random.default_rng(0).integers(1, 99, (2, 1, 3, 16)).astype(float)
    files = [tmp_path / "first.npz", tmp_path / "second.npz"]
    for rank, file in enumerate(files):
        metadata = {"answered": [rank], "ranks": 2}
        save_routing(file, RoutingFile(counts[rank], steps=4, metadata=metadata))
    refused = CliRunner().invoke(command, ["--routing", str(files[0]), "--ranks", "2"])
    assert isinstance(refused.exception, InputError)
    assert "first.npz: only what ranks [0] send: record on every host" in str(refused.exception)
    both = run("--routing", files[0], "--routing", files[1], "--ranks", 2, "--json")
    assert json.loads(both)["local_share"]["before"] > 0.0


def test_a_placers_options(routing: Path) -> None:
    args = ("--routing", routing, "--ranks", 4, "--slots-per-rank", 5, "--placer", "swift")
    still = json.loads(run(*args, "--placer-option", "max_swaps=0", "--json"))
    assert still["moved_slots"] == 0 < json.loads(run(*args, "--json"))["moved_slots"]


FOREIGN = """
import numpy as np


class Reversed:
    def place(self, routing, topology, current):
        return current[:, ::-1]


class Shorter:
    def place(self, routing, topology, current):
        return current[:, 1:]


class Raises:
    def place(self, routing, topology, current):
        raise RuntimeError("no idea")
"""


@pytest.fixture
def foreign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "foreign_placers.py").write_text(FOREIGN)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.usefixtures("foreign")
def test_a_foreign_placer(routing: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan.npz"
    named = ("--placer", "foreign_placers:Reversed", "--out", out, "--json")
    report = json.loads(run("--routing", routing, "--ranks", 4, *named))
    assert np.load(out)["physical_to_logical"][0].tolist() == list(reversed(range(16)))
    assert report["moved_slots"] == 48


@pytest.mark.usefixtures("foreign")
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["foreign_placers:Absent"], "cannot be imported: AttributeError"),
        (["json:JSONDecoder"], "has no method place"),
        (["foreign_placers:Shorter"], "placement: shape (3, 15), expected (3, 16)"),
        (["foreign_placers:Raises"], "placer 'foreign_placers:Raises': RuntimeError: no idea"),
        (["swift", "--placer-option", "max_swap=3"], "(did you mean 'max_swaps'?)"),
        (["swift", "--placer-option", "max_swaps=x"], "max_swaps: input should be a valid int"),
        (["swift", "--placer-option", "max_swaps"], "'max_swaps': expected key=value"),
        (["static", "--placer-option", "x=1"], "unknown option 'x' ('static' has no options)"),
        (["static", "--history", "counts.npz"], "placer 'static' learns nothing from it"),
    ],
)
def test_bad_placers(routing: Path, args: list[str], message: str) -> None:
    with pytest.raises(InputError) as caught:
        run("--routing", routing, "--ranks", 4, "--placer", *args)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_earlier_windows_change_the_plan(routing: Path, tmp_path: Path) -> None:
    earlier = tmp_path / "earlier.npz"
    counts = np.load(routing)["counts"]
    np.savez(earlier, counts=np.roll(counts, 5, axis=2))
    outs = tmp_path / "without.npz", tmp_path / "with.npz"
    args = ("--routing", routing, "--ranks", 4, "--json", "--out")
    run(*args, outs[0])
    run(*args, outs[1], "--history", earlier)
    without, learned = (np.load(out)["physical_to_logical"] for out in outs)
    assert (without != learned).any()
