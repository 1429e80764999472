"""Published models: layers, experts, bytes and weights come out as hand-written figures say."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gimbal.core.cost.derive import derive_profile
from gimbal.core.cost.profile import Layout, dump_profile, parse_profile
from gimbal.core.errors import InputError
from gimbal.core.model import (
    ModelConfig,
    count_experts,
    count_top_k,
    find_model,
    model_names,
    read_architecture,
    read_config,
)
from gimbal.core.model.families import FAMILIES
from gimbal.core.yaml_reader import parse_yaml
from scripts import models_page

READ, REFUSED = models_page.read_table()
published = pytest.mark.parametrize("model", READ, ids=lambda model: model.name)


def test_the_table_is_wide_enough() -> None:
    assert len({model.name for model in READ}) == len(READ) >= 25


def test_families_are_those_of_the_table() -> None:
    assert {read_architecture(model.config).family for model in READ} == set(FAMILIES)


def test_a_family_that_was_not_tried_is_named() -> None:
    known = {**READ[0].config.values, "vocab_size": None}
    found = read_architecture(ModelConfig({**known, "model_type": "new_moe"}, "config.json"))
    assert list(found.remarks()) == [
        "model_type 'new_moe' was not tried: read by the names of its keys",
        "no vocab_size: the vocabulary's weights are not counted",
    ]


@pytest.mark.parametrize("name", sorted({*model_names()} - {"qwen3-235b-a22b"}))
def test_packaged_models_are_the_published_ones(name: str) -> None:
    (model,) = [model for model in READ if model.name.lower().endswith(f"/{name}")]
    assert read_architecture(find_model(name)) == read_architecture(model.config)


def test_the_packaged_model_in_16_bits_is_the_one_in_8() -> None:
    wide, narrow = (find_model(f"qwen3-235b-a22b{kind}").values for kind in ("", "-fp8"))
    assert {**wide, "quantization_config": narrow["quantization_config"]} == narrow


@published
def test_layers_experts_and_bytes(model: Any) -> None:
    found = read_architecture(model.config)
    kinds = {group.kind: group.layers for group in found.attention}
    kinds |= {"linear": found.linear_layers} if found.linear_layers else {}
    assert {**kinds, "moe": found.experts.layers} == model.values["layers"]
    assert [found.experts.experts, found.experts.top_k] == model.values["experts"]
    assert found.expert_bytes == pytest.approx(model.expert_bytes, rel=1e-9)
    assert found.kv_bytes_per_token() == model.kv_bytes_per_token
    assert count_experts(model.config) == found.experts.experts
    assert count_top_k(model.config) == found.experts.top_k


@published
def test_weights_are_those_of_the_model_card(model: Any) -> None:
    found = read_architecture(model.config)
    assert found.parameters / 1e9 == pytest.approx(model.values["total_b"], rel=0.03)
    # Cards round by up to half a billion, and some count both matrices of the vocabulary.
    least = found.active_parameters / 1e9
    most = least + (found.head_copies - 1) * found.vocabulary * found.hidden / 1e9
    assert 0.86 * least < model.values["active_b"] < 1.05 * most


@published
def test_an_estimate_from_the_folder_is_a_profile(model: Any, tmp_path: Path) -> None:
    name = model.values.get("file", "config.json")
    given = dict(model.config.values)
    if "hf_quant_config" in model.values:
        del given["quantization_config"]
        quantization = json.dumps(model.values["hf_quant_config"])
        (tmp_path / "hf_quant_config.json").write_text(quantization)
    (tmp_path / name).write_text(json.dumps(given))
    profile = derive_profile("x", read_config(tmp_path), "b200", Layout(16, 2))
    assert parse_profile(parse_yaml(dump_profile(profile), "x"), "x") == profile
    assert profile.model.kv_bytes_per_token == model.kv_bytes_per_token
    assert profile.model.expert_bytes == round(model.expert_bytes)
    assert profile.kv_tokens > 0


ODD = (None, -1, 0, "x", 1e9, 2**40, [], {}, True, [1, "a"], [None], {"a": 1}, 0.5, [[1]], 7)


def _odd_ones(values: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The path of every key below `values`."""
    for key, value in values.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from _odd_ones(value, (*path, key))


def _with(values: dict[str, Any], path: tuple[str, ...], odd: object) -> dict[str, Any]:
    key, *rest = path
    return {**values, key: _with(values[key], tuple(rest), odd) if rest else odd}


def _complaint(config: ModelConfig) -> str:
    """What `read_architecture` refuses `config` by; empty where it does not."""
    try:
        read_architecture(config)
    except InputError as error:
        return str(error)
    return ""


def test_every_key_may_hold_nonsense() -> None:
    tried: set[str] = set()
    complaints = set()
    for model in READ:
        for path in _odd_ones(model.config.values):
            if path[-1] in tried:
                continue
            tried.add(path[-1])
            for odd in ODD:
                config = ModelConfig(_with(model.config.values, path, odd), "config.json")
                count_experts(config)
                complaints.add(_complaint(config).partition(": ")[0])
    assert complaints == {"", "config.json"}


@pytest.mark.parametrize("model", REFUSED, ids=lambda model: model.name)
def test_what_is_not_known_is_refused_and_still_counted(model: Any) -> None:
    with pytest.raises(InputError) as refusal:
        read_architecture(model.config)
    assert str(refusal.value) == f"{model.name}: {model.values['message']}"
    assert count_experts(model.config) > 1


def test_a_measurement_does_without_the_cache() -> None:
    found = read_architecture(REFUSED[0].config, cached=False)
    assert (found.experts.experts, found.quantization.parts["experts"].name) == (256, "mxfp4")
    assert found.kv_bytes_per_token() == 0


def test_the_page_is_not_stale() -> None:
    assert models_page.OUT.read_text() == models_page.page(), "run make pages"
