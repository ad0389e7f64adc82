"""The C++ kernels of each instruction set, for tests with ``parametrize("capability", ..., indirect=True)``."""

import pytest
from instruction_sets import instruction_set

from fused_attn import _extension


@pytest.fixture
def capability(request):
    if not _extension.available():
        pytest.skip(_extension.reason())
    if _extension.CPU_CAPABILITIES.index(request.param) > _extension.CPU_CAPABILITIES.index(
        _extension.cpu_capability()
    ):
        pytest.skip(f"this processor has no {request.param}")
    with instruction_set(request.param):
        yield request.param
