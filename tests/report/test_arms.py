"""Arms: built-in and from files, which share a server, and in what order they run."""

import json
from pathlib import Path

import pytest

from gimbal.bench.session import count_starts, plan_turns
from gimbal.core.config import LEVELS, parse_config
from gimbal.core.errors import InputError
from gimbal.report.arms import BUILTIN_ARMS, read_arms, select_arms

ARMS = """
small-budget:
  flags: --max-num-batched-tokens 256
  levels: [dispatch]
  policy: lmetric
tuned:
  levels: [queue]
  queue_ordering: sjf
  config: {queue: {max_wait_s: 5}}
"""


def test_arms_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "arms.yaml"
    path.write_text(ARMS)
    small, tuned = select_arms(["small-budget", "tuned"], file=path)
    assert small.flags == ("--max-num-batched-tokens", "256")
    assert small.policy == "lmetric"
    assert tuned.config == {"queue": {"max_wait_s": 5}}
    expected = {"levels": ["queue"], "queue_ordering": "sjf", "queue": {"max_wait_s": 5}}
    assert tuned.switches() == expected
    assert tuned.server(shared=True) == BUILTIN_ARMS["vllm"].server(shared=True)
    own = parse_config(json.loads(tuned.server(shared=False).config_json)).queue
    assert (own.ordering, own.max_wait_s) == ("sjf", 5.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: {levles: []}", "did you mean 'levels'"),
        ("a: {levels: [dispach]}", "levels: expected a list"),
        ("a: 3", "a: expected a mapping"),
        ("- a", "expected a mapping of arm names"),
        ("a: {config: 3}", "config: expected a mapping"),
        ("a: [", "not YAML"),
    ],
)
def test_bad_arm_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "arms.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        read_arms(path)
    assert str(path) in str(caught.value)


def test_bad_names_are_refused() -> None:
    with pytest.raises(InputError, match="did you mean 'lmetric'"):
        select_arms(["lmetrik"])
    with pytest.raises(InputError, match="named twice"):
        select_arms(["vllm", "vllm"])
    with pytest.raises(InputError, match="unknown level 'que'"):
        select_arms(["gimbal"], levels=["que"])


def test_levels_are_those_of_the_arm_gimbal_alone() -> None:
    arms = select_arms(["gimbal", "lmetric"], levels=["dispatch", "queue"])
    assert arms[0].levels == ("dispatch", "queue")
    assert arms[1].levels == ("dispatch",)
    assert select_arms(["gimbal"])[0].levels == LEVELS


def test_own_servers_get_a_configuration_that_gimbal_accepts() -> None:
    for arm in BUILTIN_ARMS.values():
        config = parse_config(json.loads(arm.server(shared=False).config_json))
        assert config.levels == arm.levels
        if "dispatch" in arm.levels:
            assert config.dispatch.policy == arm.policy


def test_who_shares_a_server() -> None:
    arms = select_arms(["vllm", "lmetric", "gimbal-queue", "gimbal"])
    shared = [arm.server(shared=True) for arm in arms]
    assert shared[0] == shared[1] == shared[2]
    assert shared[3] != shared[0]  # placement moves experts for good
    assert len({arm.server(shared=False) for arm in arms}) == 4


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
