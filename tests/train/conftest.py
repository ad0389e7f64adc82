"""Small runs, and commands in processes of their own."""

import subprocess
import sys

import pytest
import runs
from commands import environment


@pytest.fixture(autouse=True)
def _own_cache_of_data_sets(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="session")
def small():
    return runs.small


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
