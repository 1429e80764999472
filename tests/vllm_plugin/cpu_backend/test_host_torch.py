"""EPLB's modules see host events and streams; torch itself is left as it was."""

import threading
import time

import pytest
import torch

from gimbal.vllm_plugin.cpu_backend.host_torch import HostTorch


def test_events_time_the_host():
    host = HostTorch()
    start, end = host.Event(enable_timing=True), host.Event(enable_timing=True)
    start.record()
    time.sleep(0.01)
    end.record(host.accelerator.current_stream())
    end.synchronize()
    assert 9 < start.elapsed_time(end) < 5_000
    with pytest.raises(RuntimeError, match="two recorded events"):
        start.elapsed_time(host.Event())


def test_everything_else_is_torch():
    host = HostTorch()
    assert host.zeros is torch.zeros
    assert host.accelerator.is_available is torch.accelerator.is_available
    assert host.accelerator.current_accelerator() == torch.device("cpu")


def test_vllm_s_two_thread_event_works_with_it(monkeypatch):
    from vllm.distributed.eplb import eplb_utils

    monkeypatch.setattr(eplb_utils, "torch", HostTorch())
    event, woken = eplb_utils.CpuGpuEvent(), []
    thread = threading.Thread(target=lambda: (event.wait(), woken.append(1)))
    thread.start()
    event.record()
    thread.join(5)
    assert woken == [1]
    with eplb_utils.device_stream(HostTorch.Stream()):
        pass
    assert torch.Event is not HostTorch.Event
