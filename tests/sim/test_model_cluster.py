"""Clusters of models that nobody measured here: what they cost, what fits, what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from benchmarks.estimated_steps import PUBLISHED, Published, decode_step_ms, estimated_ms
from gimbal.commands.simulate import command
from gimbal.core.errors import InputError
from gimbal.core.model import find_model, model_names
from gimbal.sim.cluster import Cluster, load_cluster, model_cluster
from gimbal.sim.experts import off_source_us
from tests.small_models import MLA

SMALL = MLA | {"num_hidden_layers": 4}


@pytest.fixture
def trace(tmp_path: Path) -> str:
    path = tmp_path / "trace.jsonl"
    rows = [{"arrival_s": 0.02 * i, "prompt_tokens": 300, "output_tokens": 8} for i in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def simulate(*words: str) -> Result:
    return CliRunner().invoke(command, words, catch_exceptions=True)


@pytest.mark.parametrize(
    "run", PUBLISHED, ids=lambda run: f"{run.model}-{run.gpu}-{run.tp}-{run.concurrency}"
)
def test_estimates_are_near_published_times_per_token(run: Published) -> None:
    assert estimated_ms(run) == pytest.approx(run.tpot_ms, rel=0.35)


def test_an_estimate_says_what_is_fitted_scaled_and_assumed(trace: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    words = ("--model", str(tmp_path / "config.json"), "--gpu", "h200", "--dp", "16")
    done = simulate(*words, "--trace", trace, "--arms", "vllm-no-eplb", "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["estimated"] is True
    assert report["arms"]["vllm-no-eplb"]["completed"] == 60
    said = "\n".join(report["notes"])
    assert said in done.stderr
    for expected in (
        f"{tmp_path.name}-h200-dp16-tp1: 16 GPUs on 2 nodes, 16 engines in lock step; per GPU 2 of "
        "32 experts of each of 3 layers, 3.1 MB each",
        "blocks of 16; 2,304 bytes per token of all layers",
        "fitted: efficiencies and fixed times of h100-qwen3-30b-a3b",
        "scaled by bytes and FLOPs",
        "assumed, as on h100",
    ):
        assert expected in said


def test_a_measured_cluster_says_nothing_of_the_kind(trace: str) -> None:
    done = simulate("--trace", trace, "--arms", "vllm-no-eplb", "--json")
    report = json.loads(done.stdout)
    assert report["estimated"] is False
    assert not any("fitted" in note for note in report["notes"])


def test_kv_blocks_are_what_weights_leave() -> None:
    cluster, profile = load_cluster(model_cluster("deepseek-v3", "h200", 16))
    assert profile.model.kv_bytes_per_token == 61 * 576 * 2
    # 58 layers of 16 experts a GPU, and 17.2 billion weights besides: FP8 but for vocabulary and
    # routers (2 x 129,280 x 7,168 and 58 x 256 x 7,168), which have 16 bits.
    wide = 2 * 129_280 * 7168 + 58 * 256 * 7168
    weights = 58 * 16 * 44_050_944 + 17.2e9 + wide
    free = 0.9 * 150.7e9 - 2e9 - weights
    assert profile.kv_tokens == pytest.approx(free / (61 * 576 * 2), rel=0.01)
    _, halved = load_cluster(replace(cluster, kv_cache_dtype="fp8"))
    assert halved.kv_tokens == pytest.approx(2 * profile.kv_tokens, abs=2)
    _, wider = load_cluster(model_cluster("deepseek-v3", "h200", 32))
    assert wider.kv_tokens - profile.kv_tokens == pytest.approx(
        58 * 8 * 44_050_944 / (61 * 576 * 2), rel=1e-4
    )


def test_another_node_costs_hops_and_routed_pairs_cross_its_cards() -> None:
    apart = model_cluster("qwen3-30b-a3b", "h100", 16)
    together = replace(apart, ranks_per_node=16)
    slow, fast = load_cluster(apart)[1], load_cluster(together)[1]
    assert slow.per_group_token[0].base_us == fast.per_group_token[0].base_us + 10.0
    # A node's eight cards bring what one switch carries about as fast: half of it comes over them.
    assert slow.per_group_token[0].per_unit_us >= fast.per_group_token[0].per_unit_us
    assert decode_step_ms(slow, 64, 1000, 0.0) > decode_step_ms(fast, 64, 1000, 0.0)
    routed = replace(apart, backend="all2all")
    near = off_source_us(replace(routed, ranks_per_node=16), load_cluster(routed)[1])
    far = off_source_us(routed, load_cluster(routed)[1])
    other = 2 * 2 * 2048 / (0.8 * 50e3)
    assert far == pytest.approx(8 / 15 * other + 7 / 15 * near)
    assert off_source_us(apart, slow) == 0.0


def test_routed_pairs_travel_as_published() -> None:
    """DeepEP's low-latency kernels: 128 tokens a GPU, 8 experts, 7,168 channels, combine in 16
    bits: 118 + 195 us over 16 GPUs and 155 + 273 us over 32 (FP8 dispatch)."""
    for ranks, us in ((16, 313.0), (32, 428.0)):
        cluster = model_cluster("deepseek-v3", "h100", ranks, backend="all2all")
        _, profile = load_cluster(cluster)
        pairs = 128 * 8 * (ranks - 1) / ranks
        whole = pairs * off_source_us(cluster, profile)
        whole += sum(term.base_us for term in profile.per_group_token)
        assert whole == pytest.approx(us, rel=0.2)


@pytest.mark.parametrize("name", model_names())
def test_packaged_models_run_on_one_node_or_two(name: str) -> None:
    for dp in (8, 16, 32):
        _, profile = load_cluster(model_cluster(name, "h200", dp))
        assert profile.kv_tokens > 50_000
        assert 3.0 < decode_step_ms(profile, 1, 1000, 0.0) < 40.0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--model", "deepseek-v3", "--gpu", "h20", "--dp", "16"), "unknown GPU 'h20'"),
        (
            ("--model", "deepseek-v3", "--gpu", "h100", "--dp", "8"),
            "deepseek-v3 does not fit: 100.8 GB of weights per rank, h100 has 75.0 GB for them",
        ),
        (
            ("--model", "glm-4.5-air", "--gpu", "h200", "--dp", "1", "--tp", "64"),
            "model glm-4.5-air: 96 attention heads do not divide over tensor-parallel size 64",
        ),
        (("--model", "deepseek", "--gpu", "h200", "--dp", "8"), "did you mean 'deepseek-v3'"),
        (("--model", "zai-org/GLM-4.5-Air", "--gpu", "h200", "--dp", "8"), "packaged models: deep"),
        (("--model", "no/config.json", "--gpu", "h200", "--dp", "8"), "no/config.json: no such"),
        (("--model", "deepseek-v3", "--dp", "8"), "--model: give --gpu as well"),
        (("--model", "deepseek-v3", "--gpu", "h200"), "--model: give --dp as well"),
        (("--gpu", "h200"), "--gpu: goes with --model"),
        (("--cluster", "cpu-demo", "--model", "deepseek-v3"), "give one of them"),
        (
            ("--model", "qwen3-30b-a3b", "--gpu", "h200", "--dp", "24"),
            "128 experts do not divide over 24 ranks",
        ),
    ],
)
def test_what_cannot_be_simulated_is_said_in_a_line(words: tuple[str, ...], message: str) -> None:
    done = simulate(*words)
    assert isinstance(done.exception, InputError)
    assert message in str(done.exception)


def test_a_file_may_name_a_model_instead_of_a_profile(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("model: gpt-oss-120b\ngpu: b200\ndp: 4\nkv_cache_dtype: fp8\n")
    cluster, profile = load_cluster(path)
    assert (cluster.name, profile.name, profile.estimated) == ("mine", "mine", True)
    bad: dict[str, dict[str, Any]] = {
        "expected a profile, or a model and a gpu": {"gpu": ""},
        "unknown backend 'a2a'": {"backend": "a2a"},
        "unknown KV cache dtype 'fp9'": {"kv_cache_dtype": "fp9"},
    }
    for message, changes in bad.items():
        with pytest.raises(InputError, match=message):
            load_cluster(replace(cluster, **changes))
    with pytest.raises(InputError, match="expected a profile, or a model and a gpu"):
        load_cluster(Cluster("none", 2))


def test_names_and_defaults_are_those_of_the_server() -> None:
    names = {
        "glm-4.5-air": "glm-4.5-air-h100-dp8-tp1",
        "/models/GLM-4.5/config.json": "GLM-4.5-h100-dp8-tp1",
        "config.json": "model-h100-dp8-tp1",
    }
    assert {model: model_cluster(model, "h100", 8).name for model in names} == names
    budgets = {g: model_cluster("m", g, 8).max_num_batched_tokens for g in ("a100", "h200", "b200")}
    assert budgets == {"a100": 2048, "h200": 8192, "b200": 16384}
    assert find_model("deepseek-v3").where == "model deepseek-v3"
