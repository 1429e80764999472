"""What workers answer and what is made of it."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("torch")
sys.path.insert(0, str(Path(__file__).parent))
from fakes import EXPERTS, LAYERS, Group, skewed

from gimbal.commands.stats import summarize
from gimbal.core.errors import InputError
from gimbal.vllm_plugin.placement.experts import expert_load
from gimbal.vllm_plugin.placement.stats import gimbal_routing, to_file


def answer(member):
    state = SimpleNamespace(_gimbal_member=member)
    member.controller.models[0].state.model_name = "demo"
    return gimbal_routing(SimpleNamespace(model_runner=SimpleNamespace(eplb_state=state)))


@pytest.fixture
def group():
    group = Group(2)
    for _ in range(8):
        group.run_step(skewed(2), prefill=12, decode=4)
    return group


def test_rows_of_all_workers_become_one_recording(group):
    recording = to_file([answer(m) for m in reversed(group.members)])
    np.testing.assert_allclose(recording.counts / recording.steps, skewed(2))
    np.testing.assert_allclose(recording.decode, recording.counts / 4)
    assert recording.physical_to_logical.tolist() == [list(range(EXPERTS))] * LAYERS
    summary = summarize(recording)
    assert summary["ranks"] == 2
    assert summary["local_share"] < 0.1
    assert summary["decode_share"] == pytest.approx(0.25)
    assert recording.metadata["served_locally"] == pytest.approx(summary["local_share"])


def test_served_locally_counts_from_the_last_migration_on(group):
    group.rearrange()
    group.run_step(skewed(2))
    recording = to_file([answer(m) for m in group.members])
    assert recording.metadata["served_locally"] > 0.9
    assert recording.metadata["committed"] == 1
    assert recording.metadata["pressure_us"] == [0.0, 0.0]
    assert len(recording.metadata["straggling_us"]) == 2


def test_answers_that_make_no_recording(group):
    with pytest.raises(InputError, match="level placement is off"):
        to_file([{}, {}])
    halves = [answer(m) | {"ranks": 4, "ranks_per_source": 2} for m in group.members]
    with pytest.raises(InputError, match="1 of 4 ranks answered, not all of an engine"):
        to_file(halves[:1])


def test_ranks_of_this_host_alone_tell_of_what_they_send(group):
    recording = to_file([answer(group.members[1])])
    np.testing.assert_allclose(recording.counts / recording.steps, skewed(2)[1:])
    assert recording.metadata["answered"] == [1]
    assert recording.metadata["ranks"] == 2
    summary = summarize(recording)
    assert summary["sources"] == 1
    assert "local_share" not in summary
    assert json.loads(expert_load([answer(group.members[1])]))["answered"] == [1]
    both = [answer(member) for member in group.members]
    assert "answered" not in to_file(both).metadata
    assert json.loads(expert_load(both))["answered"] is None


def test_a_worker_without_the_level_answers_nothing():
    assert gimbal_routing(SimpleNamespace(model_runner=SimpleNamespace())) == {}
