from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from gimbal.core.errors import InputError
from gimbal.vllm_plugin.serve import checks
from gimbal.vllm_plugin.serve.flags import read_flags

MOE = {"num_experts": 32, "num_attention_heads": 8}
DENSE = {"num_attention_heads": 8}


def test_a_missing_vllm_names_the_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise checks.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(checks.metadata, "version", missing)
    with pytest.raises(InputError, match=r"gimbal-moe\[vllm\].*gimbal-moe\[cpu\]"):
        checks.installed_vllm()


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (MOE, 32),
        (DENSE, 0),
        ({"n_routed_experts": 64}, 64),
        ({"num_local_experts": 8}, 8),
        ({"text_config": {"num_experts": 16}}, 16),
    ],
)
def test_experts_are_counted(config: dict, count: int) -> None:
    assert checks.count_experts(config) == count


@pytest.mark.parametrize(
    ("words", "config", "message"),
    [
        (["m", "-ep"], DENSE, "m: not a Mixture-of-Experts model, so --enable-expert-parallel"),
        (["m", "--enable-eplb"], DENSE, "not a Mixture-of-Experts model, so --enable-eplb"),
        (
            ["m", "-ep", "--enable-eplb", "-dp", "3"],
            MOE,
            r"32 experts \+ 0 redundant = 32 slots do not divide over DP 3 x TP 1 = 3",
        ),
        (
            ["m", "-ep", "--enable-eplb", "-dp", "2", "--eplb-config.num_redundant_experts", "1"],
            MOE,
            "33 slots do not divide",
        ),
    ],
)
def test_expert_parallelism_that_cannot_work(words: list[str], config: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        checks.check_experts(read_flags(words), config)


def test_expert_parallelism_that_works() -> None:
    words = ["m", "-ep", "--enable-eplb", "-dp", "3", "--eplb-config.num_redundant_experts", "1"]
    checks.check_experts(read_flags(words), MOE)
    checks.check_experts(read_flags(["m", "-dp", "3"]), DENSE)


def test_heads_and_gpus() -> None:
    with pytest.raises(InputError, match="does not divide the model's 8 heads"):
        checks.check_heads(read_flags(["m", "-tp", "3"]), MOE)
    with pytest.raises(InputError, match="needs 4 GPUs on this machine, 2 visible"):
        checks.check_devices(read_flags(["m", "-tp", "2", "-dp", "2"]), 2)
    checks.check_devices(read_flags(["m", "-tp", "2", "-dp", "4", "-dpl", "1"]), 2)
    checks.check_devices(read_flags(["m", "-tp", "8", "--nnodes", "2"]), 2)


def test_model_folders(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such model folder"):
        checks.model_config(str(tmp_path / "gone"))
    with pytest.raises(InputError, match=r"it has no config\.json"):
        checks.model_config(str(tmp_path))
    (tmp_path / "config.json").write_text("{\n oops")
    with pytest.raises(InputError, match=r"config\.json:2: not JSON"):
        checks.model_config(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(MOE))
    assert checks.model_config(str(tmp_path)) == MOE
    assert checks.model_config("organisation/model") is None


def test_a_port_in_use() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"port {port}: already in use"):
            checks.check_port("127.0.0.1", port)
    checks.check_port("127.0.0.1", 0)
    with pytest.raises(InputError, match="port 70000"):
        checks.check_port("127.0.0.1", 70000)
