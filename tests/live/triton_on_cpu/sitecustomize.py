"""Lets vLLM's model runner V2, the default on GPUs, run on a machine without one.

V2 needs Triton kernels, and vLLM uses Triton on CPUs only where it has a backend of that name,
which the released wheels lack. With TRITON_INTERPRET=1 Triton's own interpreter runs the same
kernels on CPU tensors and asks no backend, so an entry of that name is all that is missing. Read by
every process of a server that has this folder in PYTHONPATH.
"""

import os
from types import SimpleNamespace

if os.environ.get("TRITON_INTERPRET") == "1":
    from triton.backends import backends

    backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True), compiler=None)
