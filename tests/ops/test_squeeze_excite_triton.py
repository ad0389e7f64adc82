"""The Triton implementation of squeeze_excite: numerics in the interpreter, compilation without a GPU."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


def run(*command: str, **variables: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    environment["PYTHONPATH"] = os.pathsep.join((str(ROOT), environment.get("PYTHONPATH", "")))
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.long
def test_kernels_in_the_interpreter():
    pytest.importorskip("triton")
    result = run("-m", "pytest", "-n0", "tests/ops/interpreted/squeeze_excite.py", TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stdout + result.stderr


def test_kernels_compile_for_sm_90_without_spills():
    pytest.importorskip("triton")
    options = ("--op", "squeeze_excite", "--arch", "sm_90", "--filter", "14x14, C 512$", "--no-write")
    result = run("benchmarks/gpu/compile_report.py", *options, TRITON_INTERPRET="0")
    assert result.returncode == 0, result.stdout + result.stderr
    for kernel in ("squeeze_fwd", "scale_fwd", "scale_bwd", "squeeze_bwd"):
        assert f"{kernel}_kernel" in result.stdout
