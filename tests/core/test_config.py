import pytest

from gimbal.core.config import GimbalConfig, parse_config
from gimbal.core.errors import InputError


def test_defaults_are_the_product():
    assert parse_config({}) == GimbalConfig()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"levls": ["queue"]}, "f: unknown key 'levls' (did you mean 'levels'?)"),
        ({"dispatch": {"polcy": "x"}}, "unknown key 'dispatch.polcy' (did you mean 'policy'?)"),
        ({"levels": ["queu"]}, "levels: unknown level 'queu' (did you mean 'queue'?)"),
        ({"placement": {"alpha": "much"}}, "placement.alpha: "),
        ({"dispatch": {"policy": "dinamo"}}, "f: dispatch.policy: unknown 'dinamo' (did you mean"),
        ({"queue": {"ordering": "sfj"}}, "queue.ordering: unknown 'sfj' (did you mean 'sjf'?)"),
        (
            {"queue": {"options": {"overtake_factor": 0.5}}},
            "f: queue.options.overtake_factor: input",
        ),
        ({"queue": {"options": {"overtak": 1}}}, "f: queue.options: unknown option 'overtak' (did"),
        (
            {"queue": {"ordering": "sjf", "options": {"x": 1}}},
            "unknown option 'x' ('sjf' has no op",
        ),
        (
            {"dispatch": {"policy": "nowhere.x:Y"}},
            "f: dispatch.policy: dispatch policy 'nowhere.x:",
        ),
        ({"dispatch": {"policy": "json:JSONDecoder"}}, "has no method costs"),
        ({"placement": {"placer": "eplbb"}}, "f: placement.placer: unknown 'eplbb' (did you mean"),
        ({"placement": {"backend": "nccl"}}, "f: placement.backend: unknown 'nccl' (choose from"),
        ({"placement": {"gate": -1}}, "f: placement.gate: input should be greater"),
        ({"placement": {"profile": "nowhere"}}, "f: placement.profile: "),
        ({"queue": {"slo_ttft_ms": -1}}, "queue.slo_ttft_ms: input should be greater"),
        ({"queue": {"room_tokens": 0.5}}, "queue.room_tokens: "),
        ({"queue": {"max_wait_s": float("nan")}}, "queue.max_wait_s: "),
        ({"dispatch": {"prefix_chunk_tokens": 0}}, "dispatch.prefix_chunk_tokens: "),
        ({"board_port": 70000}, "board_port: "),
    ],
)
def test_bad_values_name_the_key_and_the_nearest_valid_one(values, message):
    with pytest.raises(InputError) as error:
        parse_config(values, where="f")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_keys_of_the_old_step_decisions_are_read_and_named(caplog):
    old = {
        "protect_decodes": True,
        "tpot_factor": 3.0,
        "patience_steps": 4.0,
        "interval_backlog_steps": 8.0,
    }
    config = parse_config({"seed": 3, "queue": old | {"max_wait_s": 5.0}}, where="f")
    assert config == parse_config({"queue": {"max_wait_s": 5.0}})
    for key in ("seed", *(f"queue.{key}" for key in old)):
        said = [m for m in caplog.messages if m.startswith(f"Gimbal: f: {key} says nothing")]
        assert len(said) == 1
        assert ("queue.step_budget" in said[0]) == key.startswith("queue")
