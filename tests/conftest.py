"""One thread and one seed per test unless it asks for others, importable checks, a fixed shape fuzz, time limits."""

import gc
import os
import sys
from pathlib import Path

# Threads that wait for one another sleep: several test processes share the processors.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from hypothesis import HealthCheck, settings

# --import-mode=importlib leaves the folder of the tests off the path.
sys.path.insert(0, str(Path(__file__).parent))

from hosts import host_packages, timm, transformers  # noqa: F401

if os.environ.get("TRITON_INTERPRET") == "1":
    import interpreter  # noqa: F401

settings.register_profile(
    "fixed", derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
)
settings.load_profile("fixed")

# What PyTorch and the tests' parameters allocate stays: looking through it for garbage all the time takes an eighth of
# the interpreted kernels' time.
gc.set_threshold(100_000, 20, 20)

#: Of a test marked ``long``, in time limits of the others.
LONG = 6


def pytest_collection_modifyitems(config, items):
    """Time limits by what a test is and how busy the machine is; the longest tests first, so that none is left alone.

    A process started on a machine with more runnable processes than processors waits as much longer.
    """
    limit = float(config.getini("timeout")) * max(1.0, os.getloadavg()[0] / os.cpu_count())
    for item in items:
        long = item.get_closest_marker("long") is not None
        item.add_marker(pytest.mark.timeout(limit * (LONG if long else 1)))
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


def pytest_collection_finish():
    """What is there before the first test stays: full collections, a third of a second each, need not look at it."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish():
    gc.unfreeze()


@pytest.fixture
def one_line(capsys):
    """Runs a command that must fail with one line of error; returns its status and the line."""
    from fused_attn import cli

    def run(*arguments):
        status = cli.main([str(argument) for argument in arguments])
        errors = capsys.readouterr().err
        assert len(errors.splitlines()) == 1, errors
        assert errors.startswith("fused-attn: error: ")
        return status, errors

    return run


@pytest.fixture
def unwritten_memory_is_nan():
    from fused_attn.testing.checks import nan_in_unwritten_memory

    with nan_in_unwritten_memory():
        yield


@pytest.fixture(autouse=True)
def _settings_stay_here():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(False)
