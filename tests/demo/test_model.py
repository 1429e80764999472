"""The demo model's files: same seed, same bytes; sizes that vLLM cannot load are refused."""

import hashlib
import json

import numpy as np
import pytest

pytest.importorskip("safetensors")
pytest.importorskip("tokenizers")

from gimbal.core.errors import InputError
from gimbal.demo.manifest import load_manifest
from gimbal.demo.model import make_demo_model, to_bfloat16
from gimbal.demo.sizes import DemoSizes

SMALL = {
    "layers": 2,
    "experts": 16,
    "top_k": 2,
    "hidden": 128,
    "moe_intermediate": 32,
    "vocab": 512,
}


def digests(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return make_demo_model(tmp_path_factory.mktemp("models") / "small", DemoSizes(**SMALL))


def test_same_seed_gives_the_same_bytes_and_another_seed_others(small, tmp_path):
    again = make_demo_model(tmp_path / "again", DemoSizes(**SMALL))
    other = make_demo_model(tmp_path / "other", DemoSizes(**SMALL, seed=1))
    assert digests(again) == digests(small)
    assert digests(other)["model.safetensors"] != digests(small)["model.safetensors"]


def test_a_model_is_overwritten_but_a_foreign_folder_is_not(small, tmp_path):
    before = digests(small)
    make_demo_model(small, DemoSizes(**SMALL))
    assert digests(small) == before
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "notes.txt").write_text("keep me")
    with pytest.raises(InputError, match="not a demo model"):
        make_demo_model(foreign, DemoSizes(**SMALL))


def test_config_agrees_with_the_tensors(small):
    safetensors = pytest.importorskip("safetensors")
    config = json.loads((small / "config.json").read_text())
    with safetensors.safe_open(small / "model.safetensors", "np") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - not a dict
        assert file.get_slice("lm_head.weight").get_dtype() == "BF16"
    hidden = config["hidden_size"]
    assert shapes["model.embed_tokens.weight"] == [config["vocab_size"], hidden]
    assert shapes["model.layers.1.mlp.gate.weight"] == [config["num_experts"], hidden]
    assert shapes["model.layers.1.mlp.experts.15.down_proj.weight"] == [
        hidden,
        config["moe_intermediate_size"],
    ]
    assert shapes["model.layers.0.self_attn.o_proj.weight"] == [
        hidden,
        config["num_attention_heads"] * config["head_dim"],
    ]
    assert len(shapes) == 3 + 2 * (3 + 6 + 3 * config["num_experts"])


def test_any_text_comes_back_from_the_tokenizer(small):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(small / "tokenizer.json"))
    for text in ("plain words", "naïve 日本語 🙂\n\ttabs", "<|im_start|>user\nhi<|im_end|>"):
        ids = tokenizer.encode(text).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_a_domain_word_is_one_token(small):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(small / "tokenizer.json"))
    manifest = load_manifest(small)
    for ids, _ in manifest.domains.values():
        for token in ids[:20].tolist():
            assert tokenizer.encode(tokenizer.decode([token])).ids == [token]


def test_prompts_follow_their_domain(small):
    manifest = load_manifest(small)
    assert list(manifest.domains) == ["ember", "harbor", "meadow", "quartz"]
    rng = np.random.default_rng(0)
    prompt = manifest.prompt("ember", 200, rng)
    assert len(prompt) == 200
    assert set(prompt) <= set(manifest.domains["ember"][0].tolist())
    for ids, weights in manifest.domains.values():
        assert len(ids) == len(set(ids.tolist()))
        assert weights.sum() == pytest.approx(1)
    with pytest.raises(InputError, match=r"unknown domain 'embr' \(did you mean 'ember'\?\)"):
        manifest.prompt("embr", 1, rng)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": 200}, "hidden: .*multiple of 32, got 200"),
        ({"moe_intermediate": 48}, "moe_intermediate: .*multiple of 32"),
        ({"top_k": 32}, r"top_k: must be below experts \(32\), got 32"),
        ({"kv_heads": 3}, r"kv_heads: must divide heads \(8\)"),
        ({"vocab": 300}, "vocab: 300 leaves 41 words"),
        ({"hidden": 96}, "hidden: 96 is too narrow"),
        ({"domains": 0}, "domains: must be at least 1"),
        ({"layers": 0}, "layers: must be at least 1"),
        ({"seed": -1}, "seed: must not be negative"),
        ({"skew": 9.0}, "skew: must lie between 1 and 8"),
        ({"divergence_bits": 0.0}, "divergence_bits: must lie between 0 and 1"),
    ],
)
def test_bad_sizes_name_the_option(change, message, tmp_path):
    with pytest.raises(InputError, match=message):
        make_demo_model(tmp_path / "bad", DemoSizes(**change))
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "no gimbal_demo.json"), ("{", "gimbal_demo.json:1: not JSON"), ("{}", "malformed")],
)
def test_a_broken_manifest_is_named(tmp_path, text, message):
    if text is not None:
        (tmp_path / "gimbal_demo.json").write_text(text)
    with pytest.raises(InputError, match=message):
        load_manifest(tmp_path)


def test_bfloat16_rounds_to_nearest_even():
    values = np.array([1.0, -2.5, 1.00390625, 1.01171875, 3.0e38])
    expected = np.array([0x3F80, 0xC020, 0x3F80, 0x3F82, 0x7F62], dtype="<u2")
    assert (to_bfloat16(values) == expected).all()
