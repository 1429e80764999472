from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from gimbal.core.errors import InputError
from gimbal.core.model import ModelConfig
from gimbal.vllm_plugin.serve import checks
from gimbal.vllm_plugin.serve.flags import VllmFlags
from gimbal.vllm_plugin.serve.flags import read_flags as read_flags_of

MOE = {"num_experts": 32, "num_attention_heads": 8}
DENSE = {"num_attention_heads": 8}


def model(values: dict) -> ModelConfig:
    return ModelConfig(values, "config.json")


def read_flags(words: list[str]) -> VllmFlags:
    pytest.importorskip("vllm")
    return read_flags_of(words, "0.32.0")


def test_a_missing_vllm_names_the_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise checks.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(checks.metadata, "version", missing)
    with pytest.raises(InputError, match=r"gimbal-moe\[vllm\].*gimbal-moe\[cpu\]"):
        checks.installed_vllm()


@pytest.mark.parametrize(
    ("words", "config", "message"),
    [
        (
            ["m", "-ep", "--enable-eplb", "-dp", "3"],
            MOE,
            r"32 experts \+ 0 redundant = 32 slots do not divide over DP 3 x TP 1 = 3",
        ),
        (
            ["m", "-ep", "--enable-eplb", "-dp", "2", "--eplb-config.num_redundant_experts", "1"],
            {"text_config": MOE},
            "33 slots do not divide",
        ),
    ],
)
def test_expert_parallelism_that_cannot_work(words: list[str], config: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        checks.check_experts(read_flags(words), model(config))


def test_a_configuration_without_experts_is_said_and_left_to_vllm() -> None:
    for words, flag in (
        (["-ep"], "--enable-expert-parallel"),
        (["--enable-eplb"], "--enable-eplb"),
    ):
        (warning,) = checks.check_experts(read_flags(["m", *words]), model(DENSE))
        assert warning == f"m: its configuration names no experts, which {flag} needs"
    assert checks.check_experts(read_flags(["m"]), model(DENSE)) == ()


@pytest.mark.parametrize(
    ("names", "words", "refused"),
    [
        (["GptOssForCausalLM"], ["--enable-eplb"], True),
        (["GptOssForCausalLM"], [], False),
        (["GptOssForCausalLM"], ["--enable-eplb", "--model-impl", "transformers"], False),
        (["Qwen3MoeForCausalLM"], ["--enable-eplb"], False),
        (["GptOssForCausalLM", "Qwen3MoeForCausalLM"], ["--enable-eplb"], False),
        (["SomebodysOwn"], ["--enable-eplb"], False),
        ([], ["--enable-eplb"], False),
        ("GptOssForCausalLM", ["--enable-eplb"], False),  # no list
    ],
)
def test_a_class_that_cannot_move_experts_is_named(
    names: object, words: list[str], refused: bool
) -> None:
    flags, config = read_flags(["m", *words]), model(MOE | {"architectures": names})
    if not refused:
        checks.check_class(flags, config, "0.32.0")
        return
    with pytest.raises(InputError, match=r"vLLM 0\.32\.0 cannot move experts of GptOssForCausalLM"):
        checks.check_class(flags, config, "0.32.0")


def test_expert_parallelism_that_works() -> None:
    words = ["m", "-ep", "--enable-eplb", "-dp", "3", "--eplb-config.num_redundant_experts", "1"]
    assert checks.check_experts(read_flags(words), model(MOE)) == ()
    # Which of several counts vLLM takes is vLLM's to say.
    several = model({"a": {"num_experts": 8}, "b": {"num_experts": 6}})
    (warning,) = checks.check_experts(read_flags(["m", "--enable-eplb", "-dp", "5"]), several)
    assert warning == "m: how many experts it has is not known here: vLLM decides"


def test_heads_and_gpus() -> None:
    with pytest.raises(InputError, match="does not divide the model's 8 heads"):
        checks.check_heads(read_flags(["m", "-tp", "3"]), model(MOE))
    checks.check_heads(read_flags(["m", "-tp", "3"]), model(MOE | {"text_config": MOE}))
    with pytest.raises(InputError, match="needs 4 GPUs on this machine, 2 visible"):
        checks.check_devices(read_flags(["m", "-tp", "2", "-dp", "2"]), 2)
    checks.check_devices(read_flags(["m", "-tp", "2", "-dp", "4", "-dpl", "1"]), 2)
    checks.check_devices(read_flags(["m", "-tp", "8", "--nnodes", "2"]), 2)
    checks.check_devices(read_flags(["m", "-tp", "8", "--data-parallel-backend=ray"]), 2)


def test_model_folders(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such model folder"):
        checks.model_config(str(tmp_path / "gone"))
    with pytest.raises(InputError, match=r"it has no config\.json"):
        checks.model_config(str(tmp_path))
    (tmp_path / "config.json").write_text("{\n oops")
    with pytest.raises(InputError, match=r"config\.json:2: not JSON"):
        checks.model_config(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(MOE))
    assert checks.model_config(str(tmp_path)) == ModelConfig(MOE, str(tmp_path / "config.json"))
    assert checks.model_config("organisation/model") is None
    assert checks.model_config(str(tmp_path / "config.json")) is None  # one file: vLLM's to say
    (tmp_path / "config.json").unlink()
    (tmp_path / "params.json").write_text('{"dim": 64, "moe": {"num_experts": 8}}')
    found = checks.model_config(str(tmp_path))
    assert found is not None
    assert found.values == {"dim": 64, "moe": {"num_experts": 8}}
    found = checks.check_model(read_flags([str(tmp_path), "-ep"]), "0.32.0")
    assert found == ()


def test_a_configuration_that_is_elsewhere_is_not_judged(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MOE))
    words = [str(tmp_path), "-tp", "3"]
    for more in (["--hf-config-path", "x"], ["--hf-overrides", "{}"]):
        assert checks.check_model(read_flags([*words, *more]), "0.32.0") == ()
    with pytest.raises(InputError, match="does not divide"):
        checks.check_model(read_flags(words), "0.32.0")


def test_a_port_in_use() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"port {port}: already in use"):
            checks.check_port("127.0.0.1", port)
    with pytest.raises(InputError, match="port 70000"):
        checks.check_port("127.0.0.1", 70000)
    with pytest.raises(InputError, match=r"--host 192\.0\.2\.1: "):
        checks.check_port("192.0.2.1", 8000)


def test_where_a_server_may_not_listen(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--port 0: .* choose one"):
        checks.check_address(read_flags(["m", "--port", "0"]))
    with pytest.raises(InputError, match=r"--uds .*: already there"):
        checks.check_address(read_flags(["m", "--uds", str(tmp_path)]))
    checks.check_address(read_flags(["m", "--uds", str(tmp_path / "new"), "--port", "0"]))
    checks.check_address(read_flags(["m", "--headless", "--port", "0"]))
