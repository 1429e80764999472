"""When the backend acts, and that it leaves no trace when it does not."""

from types import SimpleNamespace

import pytest

from gimbal.core.errors import InputError
from gimbal.vllm_plugin.cpu_backend import hook
from gimbal.vllm_plugin.seams import SEAMS, check_seams


def engine_args(**changes):
    values = {
        "enable_expert_parallel": True,
        "additional_config": {"gimbal": {}},
        "enforce_eager": True,
        "enable_eplb": False,
        "eplb_config": SimpleNamespace(communicator=None),
    }
    return SimpleNamespace(**{**values, **changes})


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        ({"enable_expert_parallel": False}, False),
        ({"additional_config": {}}, False),
        ({"additional_config": {"gimbal": {"enabled": False}}}, False),
        ({"additional_config": {"gimbal": {"levels": []}}}, True),
    ],
)
def test_wanted_only_with_gimbal_and_expert_parallelism(changes, expected):
    assert hook.wanted(engine_args(**changes)) is expected


def test_not_wanted_on_a_gpu(monkeypatch):
    import vllm.platforms

    monkeypatch.setattr(vllm.platforms.current_platform, "is_cpu", lambda: False)
    assert hook.wanted(engine_args()) is False


def build(worker="vllm.v1.worker.cpu_worker.CPUWorker", seen=None, **changes):
    def original(args):
        from vllm.config import parallel

        if seen is not None:
            seen.append(parallel.current_platform.is_cuda_alike())
        return SimpleNamespace(parallel_config=SimpleNamespace(worker_cls=worker))

    args = engine_args(**changes)
    return hook._expert_parallel_config(original, args), args


def test_names_the_worker_and_runs_eagerly():
    config, args = build(enforce_eager=False)
    assert config.parallel_config.worker_cls == hook.EXPERT_PARALLEL_WORKER
    assert args.enforce_eager


def test_another_worker_class_is_refused_with_one_line():
    with pytest.raises(InputError, match="--worker-cls my_worker"):
        build(worker="my_worker")


@pytest.mark.parametrize("eplb", [False, True])
def test_the_platform_check_is_relaxed_only_while_an_eplb_configuration_is_built(eplb):
    from vllm.config import parallel

    seen = []
    _, args = build(seen=seen, enable_eplb=eplb)
    assert seen == [eplb]
    assert not parallel.current_platform.is_cuda_alike()
    assert args.eplb_config.communicator == ("torch_gloo" if eplb else None)


def test_a_transport_that_cannot_work_is_refused():
    with pytest.raises(InputError, match="only 'torch_gloo' works"):
        build(enable_eplb=True, eplb_config=SimpleNamespace(communicator="nixl"))


def test_vllm_refuses_eplb_on_cpu_without_gimbal():
    from vllm.config import ParallelConfig

    arguments = {"enable_eplb": True, "enable_expert_parallel": True, "data_parallel_size": 2}
    with pytest.raises(ValueError, match="only supported on CUDA"):
        ParallelConfig(**arguments)
    with hook._eplb_allowed_on_cpu():
        assert ParallelConfig(**arguments).enable_eplb
    with pytest.raises(ValueError, match="only supported on CUDA"):
        ParallelConfig(**arguments)


def test_install_is_idempotent():
    from vllm.engine.arg_utils import EngineArgs

    hook.install()
    once = EngineArgs.create_engine_config
    hook.install()
    assert EngineArgs.create_engine_config is once


def test_every_seam_is_in_the_installed_vllm():
    from pathlib import Path

    import vllm

    ours = tuple(s for s in SEAMS if s.level == "cpu_backend")
    assert len(ours) >= 15
    assert check_seams(Path(vllm.__file__).parent, ours) == []
