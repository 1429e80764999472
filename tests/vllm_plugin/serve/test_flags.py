from __future__ import annotations

import pytest

from gimbal.core.errors import InputError
from gimbal.vllm_plugin.serve.flags import read_flags


@pytest.mark.parametrize(
    "words",
    [
        ["m", "--data-parallel-size", "4", "--tensor-parallel-size=2", "--port", "81"],
        ["--data_parallel_size=4", "m", "-tp", "2", "--port=81"],
        ["--dtype", "bfloat16", "m", "-dp", "4", "-tp=2", "--port", "81"],
    ],
)
def test_every_spelling_is_understood_and_passed_on_untouched(words: list[str]) -> None:
    flags = read_flags(words)
    assert (flags.model, flags.dp, flags.tp, flags.port) == ("m", 4, 2, 81)
    assert list(flags.rest) == words


@pytest.mark.parametrize(
    ("words", "eplb"),
    [
        (["m", "--enable-eplb"], True),
        (["m", "--enable_eplb"], True),
        (["m", "--enable-eplb", "--no-enable-eplb"], False),
        (["m", "--no-enable-eplb"], False),
        (["m", "--enable-eplb", "--disable-eplb"], False),
        (["m", "--disable-eplb", "--enable-eplb"], True),
    ],
)
def test_switches(words: list[str], eplb: bool) -> None:
    assert read_flags(words).eplb is eplb


@pytest.mark.parametrize(
    "words",
    [
        ["m", "--eplb-config", '{"num_redundant_experts": 4}'],
        ["m", "--eplb-config.num_redundant_experts", "4"],
        ["m", "--eplb_config.num_redundant_experts=4"],
    ],
)
def test_redundant_experts(words: list[str]) -> None:
    flags = read_flags(words)
    assert flags.redundant_experts == 4
    assert list(flags.rest) == words


def test_additional_config_is_taken_out_and_merged() -> None:
    whole = '{"a": 1, "gimbal": {"seed": 3}}'
    flags = read_flags(["m", "-ac", whole, "--seed", "7", "--additional-config.b.c", "2"])
    assert flags.additional_config == {"a": 1, "gimbal": {"seed": 3}, "b": {"c": 2}}
    assert flags.rest == ("m", "--seed", "7")


def test_a_word_behind_an_unknown_flag_is_not_the_model() -> None:
    assert read_flags(["--unknown", "value"]).model is None
    assert read_flags(["--unknown=value", "m"]).model == "m"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["m", "--port"], "--port: needs a value"),
        (["m", "--port", "x"], "--port: expected a whole number, got 'x'"),
        (["m", "-dp", "0"], "--data-parallel-size: must be at least 1, got 0"),
        (["m", "--eplb-config", "{"], "--eplb-config: not JSON"),
        (["m", "--additional-config", "[]"], "--additional-config: expected a JSON object"),
        (["m", "--eplb-config", '{"num_redundant_experts": "x"}'], "num_redundant_experts"),
    ],
)
def test_bad_values(words: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message.replace("(", r"\(").replace("[", r"\[")):
        read_flags(words)
