"""Arms on live servers: who shares one, what is switched, and in what order they run."""

import json
from pathlib import Path

import pytest

from gimbal.bench.arms import needs_own_server, refuse_simulated, server_spec, switches
from gimbal.bench.turns import count_starts, plan_turns
from gimbal.core.config import parse_config
from gimbal.core.errors import InputError
from gimbal.report.arms import ARMS, Arm, get_arm
from gimbal.report.arms_file import select_arms


def test_what_is_switched_needs_no_server_of_its_own() -> None:
    config = {"levels": ["queue"], "queue": {"ordering": "sjf", "max_wait_s": 5}}
    arm = Arm("tuned", config=config)
    expected = {"levels": ["queue"], "queue_ordering": "sjf", "queue": {"max_wait_s": 5}}
    assert switches(arm) == expected
    assert server_spec(arm, shared=True) == server_spec(get_arm("vllm"), shared=True)
    own = parse_config(json.loads(server_spec(arm, shared=False).config_json)).queue
    assert (own.ordering, own.max_wait_s) == ("sjf", 5.0)
    assert switches(get_arm("lmetric")) == {"levels": ["dispatch"], "policy": "lmetric"}


@pytest.mark.parametrize(
    "config",
    [
        {"levels": ["queue"], "queue": {"priority_tokens": 100.0}},
        {"levels": ["dispatch"], "dispatch": {"max_signal_age_ms": 50.0}},
        {"levels": [], "step_records": "steps"},
    ],
)
def test_what_a_running_server_does_not_change_needs_one(config) -> None:
    arm = Arm("own", config=config)
    spec = server_spec(arm, shared=True)
    assert spec != server_spec(get_arm("vllm"), shared=True)
    assert needs_own_server(arm)
    # Started and switched it is what was asked for.
    started = json.loads(spec.config_json)
    for section in ("dispatch", "queue"):
        changed = started.get(section, {}) | switches(arm).get(section, {})
        assert changed == config.get(section, {})


def test_options_are_switched_with_their_policies() -> None:
    config = {
        "levels": ["dispatch", "queue"],
        "dispatch": {"options": {"session_patience": 2.0}},
        "queue": {"options": {"overtake_factor": 5}},
    }
    arm = Arm("o", config=config)
    assert not needs_own_server(arm)
    assert switches(arm)["policy_options"] == {"session_patience": 2.0}
    assert switches(arm)["queue"] == {"options": {"overtake_factor": 5}}


def test_own_servers_get_a_configuration_that_gimbal_accepts() -> None:
    for arm in ARMS.values():
        config = parse_config(json.loads(server_spec(arm, shared=False).config_json))
        assert config == arm.gimbal_config()


def test_who_shares_a_server() -> None:
    arms = select_arms(["vllm", "lmetric", "gimbal-queue", "gimbal", "vllm-no-eplb"])
    shared = [server_spec(arm, shared=True) for arm in arms]
    assert shared[0] == shared[1] == shared[2]
    assert shared[3] != shared[0]  # placement moves experts for good
    assert shared[4] != shared[0]
    assert len({server_spec(arm, shared=False) for arm in arms}) == 5


def test_arms_of_the_simulator_alone_are_refused() -> None:
    refuse_simulated([arm for arm in ARMS.values() if arm.simulated is None])
    for name in ("gimbal-owner", "gimbal-affinity", "moe-tuner", "sem-moe"):
        with pytest.raises(InputError, match=f"'{name}' is for `gimbal simulate` only"):
            refuse_simulated([get_arm(name)])


@pytest.mark.parametrize("path", sorted(Path("examples").glob("arms*.yaml")), ids=str)
def test_examples_are_arms_that_servers_can_run(path: Path) -> None:
    arms = select_arms(file=path)
    assert len(arms) > 1
    for arm in arms:
        parse_config(json.loads(server_spec(arm, shared=True).config_json))


def test_plan_runs_every_arm_once_per_repeat_and_starts_few_servers() -> None:
    arms = select_arms(["vllm", "lmetric", "gimbal"])
    plan = plan_turns(arms, 4, share=True)
    for repeat in range(4):
        names = sorted(t.arm.name for t in plan if t.repeat == repeat)
        assert names == ["gimbal", "lmetric", "vllm"]
    # Two servers there and back: the last of a repeat is the first of the next.
    assert count_starts(plan, resident=1) == 5
    assert count_starts(plan, resident=2) == 2
    first_two = [
        [t.arm.name for t in plan if t.repeat == r and t.spec == plan[0].spec] for r in (0, 1)
    ]
    assert first_two == [["vllm", "lmetric"], ["lmetric", "vllm"]]


def test_own_servers_alternate_their_order() -> None:
    plan = plan_turns(select_arms(["vllm", "lmetric", "dynamo"]), 2, share=False)
    assert [t.arm.name for t in plan] == [
        "vllm", "lmetric", "dynamo", "dynamo", "lmetric", "vllm",
    ]  # fmt: skip
    assert count_starts(plan, resident=1) == 5
