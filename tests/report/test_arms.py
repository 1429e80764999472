"""Arms: built-in and from files, over a configuration, and the choice among them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gimbal.core.config import LEVELS
from gimbal.core.errors import InputError
from gimbal.report.arms import ARMS, get_arm
from gimbal.report.arms_file import parse_arm, read_arms, select_arms

TEXT = """
small-budget:
  description: a smaller step
  flags: --max-num-batched-tokens 256
  levels: [dispatch]
  policy: lmetric
tuned:
  levels: [queue]
  queue_ordering: sjf
  config: {queue: {max_wait_s: 5}}
options:
  levels: [dispatch, placement]
  policy: gimbal
  policy_options: {session_patience: 3}
  placer: eplb
  flags: [--no-enable-eplb]
  signals: coordinator
plain: {}
"""


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_arms_from_a_file(tmp_path: Path) -> None:
    path = write(tmp_path / "arms.yaml", TEXT)
    small, tuned, options, plain = select_arms(
        ["small-budget", "tuned", "options", "plain"], file=path
    )
    assert small.description == "a smaller step"
    assert small.flags == ("--max-num-batched-tokens", "256")
    assert small.levels == ("dispatch",)
    assert small.gimbal_config().dispatch.policy == "lmetric"
    queue = tuned.gimbal_config().queue
    assert (queue.ordering, queue.max_wait_s) == ("sjf", 5.0)
    assert options.gimbal_config().dispatch.options == {"session_patience": 3}
    assert options.gimbal_config().placement.placer == "eplb"
    assert (options.flags, options.signals) == (("--no-enable-eplb",), "coordinator")
    assert plain.levels == ()


def test_without_names_a_file_s_arms_run_beside_vllm(tmp_path: Path) -> None:
    path = write(tmp_path / "arms.yaml", TEXT)
    names = [arm.name for arm in select_arms(file=path)]
    assert names == ["vllm", "small-budget", "tuned", "options", "plain"]
    assert [arm.name for arm in select_arms()] == ["vllm", "gimbal"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: {simulated: 3}", "simulated: expected a mapping"),
        ("a: {simulated: {orakle: true}}", "did you mean 'oracle'"),
        ("a: {simulated: {pressure: ownr}}", "simulated.pressure: input should be"),
        ("a: {levles: []}", "did you mean 'levels'"),
        ("a: {levels: [dispach]}", "levels: expected a list"),
        ("a: {levels: 3}", "levels: expected a list"),
        ("a: 3", "a: expected a mapping"),
        ("- a", "expected a mapping of arm names"),
        ("a: {config: 3}", "config: expected a mapping"),
        ("a: {config: {queue: 3}, queue_ordering: sjf}", "config.queue: expected a mapping"),
        ("a: {config: {queue: {max_wait: 3}}}", "did you mean 'max_wait_s'"),
        ("a: {flags: 3}", "flags: expected a list or one text"),
        ('a: {flags: "--a \'b"}', "flags: No closing quotation"),
        ("a: {signals: bord}", "signals: expected board or coordinator"),
        ("a: {policy: lmetrik}", "did you mean 'lmetric'"),
        ("a: {queue_ordering: sfj}", "did you mean 'sjf'"),
        ("a: {placer: eplp}", "did you mean 'eplb'"),
        ("a: {policy: lmetric, policy_options: {x: 1}}", "unknown option 'x'"),
        ("a: {policy: nowhere.at.all:Policy}", "cannot be imported"),
        ("a: {policy: gimbal, config: {dispatch: {policy: llm-d}}}", "give one"),
        ("a: [", "not YAML"),
    ],
)
def test_bad_arm_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path / "arms.yaml", text)
    with pytest.raises(InputError, match=message) as caught:
        read_arms(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00binary", b"a: \x00"])
def test_binary_files_are_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "arms.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"arms\.yaml.*: not (UTF-8 text|a text file)$") as caught:
        read_arms(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="no such file"):
        read_arms(tmp_path / "none.yaml")


def test_bad_names_are_refused() -> None:
    with pytest.raises(InputError, match="did you mean 'lmetric'"):
        select_arms(["lmetrik"])
    with pytest.raises(InputError, match="named twice"):
        select_arms(["vllm", "vllm"])
    with pytest.raises(InputError, match="unknown level 'que'"):
        select_arms(["gimbal"], levels=["que"])
    with pytest.raises(InputError, match="no arm named"):
        select_arms([])
    with pytest.raises(InputError, match="did you mean 'gimbal-dp'"):
        select_arms(["gimbal-dispatch-queue"])


def test_levels_are_those_of_the_arm_gimbal_alone() -> None:
    arms = select_arms(["gimbal", "lmetric"], levels=["dispatch", "queue"])
    assert arms[0].levels == ("dispatch", "queue")
    assert arms[1].levels == ("dispatch",)
    assert select_arms(["gimbal"])[0].levels == LEVELS


def test_a_configuration_lies_under_every_arm_and_is_the_arm_gimbal(tmp_path: Path) -> None:
    path = write(
        tmp_path / "gimbal.yaml",
        "levels: [dispatch, queue]\ndispatch: {options: {session_patience: 3}}\n"
        "queue: {max_wait_s: 7}\n",
    )
    names = ["vllm", "gimbal", "gimbal-dispatch", "lmetric"]
    vllm, ours, dispatch, lmetric = select_arms(names, config_file=path)
    assert ours.levels == ("dispatch", "queue")
    assert vllm.levels == ()
    assert dispatch.gimbal_config().dispatch.options == {"session_patience": 3}
    assert lmetric.gimbal_config().dispatch.options == {}  # they were another policy's
    assert {arm.gimbal_config().queue.max_wait_s for arm in (vllm, ours, lmetric)} == {7.0}
    assert select_arms(["gimbal"], ["queue"], config_file=path)[0].levels == ("queue",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("quue: {}", "did you mean 'queue'"),
        ("dispatch: {policy: lmetrik}", "did you mean 'lmetric'"),
        ("enabled: false", "arm vllm: enabled: false is no arm"),
    ],
)
def test_a_bad_configuration_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path / "gimbal.yaml", text)
    with pytest.raises(InputError, match=message):
        select_arms(config_file=path)


@pytest.mark.parametrize("name", ARMS)
def test_built_in_arms_are_sound_and_described(name: str) -> None:
    arm = ARMS[name]
    assert arm.name == name
    assert arm.description
    assert not arm.description.endswith(".")
    assert arm.gimbal_config().levels == arm.levels


@pytest.mark.parametrize("name", ARMS)
def test_what_records_say_of_an_arm_reads_back(name: str) -> None:
    arm = get_arm(name)
    again = parse_arm("run.json", name, json.loads(json.dumps(arm.to_json())))
    assert again.gimbal_config() == arm.gimbal_config()
    assert again.to_json() == arm.to_json()


def test_records_of_earlier_versions_read_back() -> None:
    old = {
        "levels": ["dispatch"],
        "policy": "lmetric",
        "queue_ordering": None,
        "flags": [],
        "config": {},
    }
    arm = parse_arm("run.json", "old", old)
    assert (arm.levels, arm.gimbal_config().dispatch.policy) == (("dispatch",), "lmetric")


def test_an_arm_may_name_a_policy_by_its_class(tmp_path: Path) -> None:
    write(tmp_path / "their_policy.py", "class First:\n    def costs(self, request, loads): ...\n")
    write(tmp_path / "arms.yaml", "a: {levels: [dispatch], policy: 'their_policy:First'}")
    code = (
        "from gimbal.report.arms_file import select_arms\nfrom pathlib import Path\n"
        "print(select_arms(['a'], file=Path('arms.yaml'))[0].gimbal_config().dispatch.policy)"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, '.')\n{code}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "their_policy:First"
