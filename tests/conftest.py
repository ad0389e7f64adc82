import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread():
    """The suite runs on all cores, one process each."""
    torch.set_num_threads(1)
