"""Small runs on scikit-learn's digits, at 8x8 pixels: a step takes milliseconds."""

import subprocess
import sys
from pathlib import Path

import pytest
from commands import environment

from fused_attn.train import TrainConfig


@pytest.fixture(scope="session")
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
        command = [sys.executable, *map(str, arguments)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = subprocess.Popen(command, text=True, env=environment(), **pipes, **kwargs)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
