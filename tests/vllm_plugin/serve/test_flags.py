from __future__ import annotations

import pytest

from gimbal.core.errors import InputError
from gimbal.vllm_plugin.serve.flags import VllmFlags
from gimbal.vllm_plugin.serve.flags import read_flags as read_flags_of

pytest.importorskip("vllm")


def read_flags(words: list[str]) -> VllmFlags:
    return read_flags_of(words, "0.32.0")


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


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (
            ["--additional-config", '{"a": 1, "gimbal": {"seed": 3}}'],
            {"a": 1, "gimbal": {"seed": 3}},
        ),
        (["--additional-config.b.c", "2", "--additional_config.d=3"], {"b": {"c": 2}, "d": 3}),
        # vLLM lets dotted keys replace the whole.
        (["--additional-config", '{"a": 1}', "--additional-config.b", "2"], {"b": 2}),
    ],
)
def test_additional_config_is_taken_out(words: list[str], value: dict) -> None:
    flags = read_flags(["m", *words, "--seed", "7"])
    assert flags.additional_config == value
    assert flags.rest == ("m", "--seed", "7")


@pytest.mark.parametrize(
    ("words", "engines"),
    [
        (["-dp", "8"], 8),
        (["-dp", "8", "-dpl", "2"], 2),
        (["-dp", "8", "--nnodes", "4"], 2),
        (["-dp", "2", "--nnodes", "4"], 1),
        (["-dp", "8", "--data-parallel-rank", "3"], 1),
        (["-dp", "8", "--headless", "-dpl", "0"], 0),
    ],
)
def test_engines_of_this_machine(words: list[str], engines: int) -> None:
    assert read_flags(["m", *words]).local_engines == engines


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["m", "-dp", "0"], "--data-parallel-size: must be at least 1, got 0"),
        (["m", "--eplb-config", "{"], "--eplb-config:1: not JSON"),
        (["m", "--additional-config", "[]"], "--additional-config: expected a JSON object"),
    ],
)
def test_bad_values(words: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message.replace("(", r"\(").replace("[", r"\[")):
        read_flags(words)


def test_redundant_experts_that_are_no_number() -> None:
    flags = read_flags(["m", "--eplb-config", '{"num_redundant_experts": "x"}'])
    with pytest.raises(InputError, match="num_redundant_experts: expected a whole number"):
        _ = flags.redundant_experts
