"""One thread per test unless it asks for more, the contract's checks importable, and a fixed shape fuzz."""

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

# --import-mode=importlib leaves the folder of the tests off the path.
sys.path.insert(0, str(Path(__file__).parent))

settings.register_profile(
    "fixed", derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
)
settings.load_profile("fixed")


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)
