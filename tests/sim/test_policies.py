"""Arms in the simulator: what is in force, and the flags that it understands."""

from dataclasses import replace

import pytest

from gimbal.core.errors import InputError
from gimbal.report.arms import ARMS, Arm, get_arm
from gimbal.sim.cluster import load_cluster
from gimbal.sim.policies import FLAGS, policies_of, with_flags

CLUSTER, _ = load_cluster("h100x4-paper")


def resolved(name):
    arm = get_arm(name)
    return policies_of(arm, with_flags(CLUSTER, arm))


@pytest.mark.parametrize("name", ["gimbal", "gimbal-queue", "lmetric"])
def test_more_engines_than_signals_hold_are_refused_as_a_server_refuses_them(name):
    with pytest.raises(InputError) as refused:
        policies_of(get_arm(name), replace(CLUSTER, dp=257))
    line = str(refused.value)
    assert line.startswith(f"arm {name}: h100x4-paper has 257 engines: levels ")
    assert line.endswith(" serve at most 256")
    policies_of(get_arm(name), replace(CLUSTER, dp=256))


@pytest.mark.parametrize("name", ["vllm", "vllm-legacy", "gimbal-ep"])
def test_what_needs_no_signals_is_simulated_with_any_number_of_engines(name):
    policies_of(get_arm(name), replace(CLUSTER, dp=320))


@pytest.mark.parametrize(
    ("name", "policy", "fresh", "ordering", "placer", "feedback"),
    [
        ("vllm", "vllm", False, "fcfs", "eplb", False),
        ("vllm-no-eplb", "vllm", False, "fcfs", "static", False),
        ("vllm-legacy", "vllm-legacy", False, "fcfs", "eplb", False),
        ("vllm-legacy-no-eplb", "vllm-legacy", False, "fcfs", "static", False),
        ("lmetric", "lmetric", True, "fcfs", "eplb", False),
        ("hrrn", "vllm", False, "hrrn", "eplb", False),
        ("gimbal-dp", "gimbal", True, "gimbal", "eplb", False),
        ("gimbal-ep", "vllm", False, "fcfs", "gimbal", False),
        ("gimbal-no-feedback", "gimbal", True, "gimbal", "gimbal", False),
        ("gimbal", "gimbal", True, "gimbal", "gimbal", True),
        ("sem-moe", "vllm", False, "fcfs", "sem-moe", False),
    ],
)
def test_where_a_level_is_off_vllm_decides(name, policy, fresh, ordering, placer, feedback):
    own = resolved(name)
    assert (own.dispatch.policy, own.fresh_signals) == (policy, fresh)
    assert own.queue.ordering == ordering
    assert own.placement.placer == placer
    assert (own.feedback is not None) == feedback


def test_without_eplb_nobody_moves_experts_but_an_oracle_before_the_run():
    still = with_flags(CLUSTER, get_arm("vllm-no-eplb"))
    assert policies_of(get_arm("gimbal"), still).placement.placer == "static"
    assert policies_of(get_arm("moe-tuner"), still).placement.placer == "moe-tuner"


def test_options_reach_what_is_in_force():
    config = {
        "levels": ["dispatch", "queue", "feedback"],
        "dispatch": {"options": {"session_patience": 3}},
        "queue": {"options": {"overtake_factor": 5}, "max_wait_s": 0},
        "feedback": {"weight": 0.5},
    }
    own = policies_of(Arm("own", config=config), CLUSTER)
    assert own.dispatch.options == {"session_patience": 3}
    assert (own.queue.options, own.queue.max_wait_s) == ({"overtake_factor": 5}, 0)
    assert own.feedback.weight == 0.5
    config["levels"] = []
    off = policies_of(Arm("own", config=config), CLUSTER)
    assert off.dispatch.options == off.queue.options == {}
    assert off.feedback is None


def test_flags_change_the_cluster():
    flags = (
        "--max-num-batched-tokens=512",
        "--max_num_seqs",
        "64",
        "--long-prefill-token-threshold",
        "0",
        "--prefill-schedule-interval",
        "4",
        "--no-enable-eplb",
        "--no-enable-prefix-caching",
    )
    changed = with_flags(CLUSTER, Arm("a", flags=flags))
    assert (changed.max_num_batched_tokens, changed.max_num_seqs) == (512, 64)
    assert (changed.long_prefill_token_threshold, changed.prefill_schedule_interval) == (0, 4)
    assert not changed.enable_eplb
    assert not changed.enable_prefix_caching
    back = with_flags(changed, Arm("b", flags=("--enable-eplb", "--enable-prefix-caching")))
    assert back.enable_eplb
    assert back.enable_prefix_caching


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--block-size", "32"), "arm a: the simulator does not understand '--block-size'"),
        (("--enable-eplb=true",), "does not understand '--enable-eplb=true'"),
        (("--max-num-seqs",), "--max-num-seqs '': expected a whole number >= 1"),
        (("--max-num-seqs", "x"), "--max-num-seqs 'x': expected"),
        (("--max-num-batched-tokens", "0"), "expected a whole number >= 1"),
    ],
)
def test_other_flags_are_refused(flags, message):
    with pytest.raises(InputError) as caught:
        with_flags(CLUSTER, Arm("a", flags=flags))
    assert message in str(caught.value)


def test_every_built_in_arm_has_flags_that_the_simulator_understands():
    for arm in ARMS.values():
        policies_of(arm, with_flags(CLUSTER, arm))
    assert "--no-enable-eplb" in FLAGS
