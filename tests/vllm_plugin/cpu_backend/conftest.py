import sys
from pathlib import Path

import pytest

# The reference model is a plain module beside the tests that use it.
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session", autouse=True)
def vllm_kernels():
    """vLLM's compiled operators; the tests of this folder need the CPU build."""
    pytest.importorskip("vllm")
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        pytest.skip("needs vLLM's CPU build")
    current_platform.import_kernels()
