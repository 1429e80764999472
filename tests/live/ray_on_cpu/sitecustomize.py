"""Lets vLLM's Ray backend place engines on a machine without GPUs.

vLLM's CPU platform has no resource of Ray's. Here it has the GPU's, and the Ray that vLLM starts
has some; they are counted and never touched. `tests/live/on_import` goes into PYTHONPATH, too.
"""

from functools import partial
from types import ModuleType

from changed_on_import import change_on_import

RAY = {"num_gpus": 2, "num_cpus": 4, "include_dashboard": False, "object_store_memory": 80 << 20}


def name_resource(module: ModuleType) -> None:
    module.CpuPlatform.ray_device_key = "GPU"


def make_room(module: ModuleType) -> None:
    module.init = partial(module.init, **RAY)


change_on_import({"vllm.platforms.cpu": name_resource, "ray": make_room})
