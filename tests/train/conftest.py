"""Small runs on scikit-learn's digits, at 8x8 pixels: a step takes milliseconds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fused_attn.train import TrainConfig

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def settings_stay_here():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def small():
    """Makes the configuration of a small run in ``out``."""

    def make(out: Path, **changes) -> TrainConfig:
        settings = {
            "model": "wrn_10_1",
            "dataset": "digits",
            "image_size": 8,
            "train_images": 256,
            "batch_size": 32,
            "epochs": 1,
            "log_every": 1,
            "threads": 1,
        }
        return TrainConfig(out=out, **{**settings, **changes})

    return make


@pytest.fixture
def command():
    """Starts ``python ARGUMENTS`` away from any terminal, with this source tree importable; it ends with the test."""
    started = []

    def start(*arguments, **kwargs) -> subprocess.Popen:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            **kwargs,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
