"""``pytest benchmarks --benchmark-compare`` notices a slower kernel, and only that."""

import os

import pytest
from commands import ROOT, environment, python

from fused_attn import _extension

SLOWER = """
import time
from fused_attn.ops._floor.operators import Public

call = Public.__call__

def slower(*args):
    time.sleep(0.02)
    return call(*args)

Public.__call__ = slower
"""


@pytest.mark.skipif(not _extension.available(), reason="the case runs the C++ kernels")
def test_a_slower_kernel_is_a_regression(tmp_path):
    (tmp_path / "slower.py").write_text(SLOWER)
    # Within a worker of a parallel run of the tests, pytest-benchmark would measure nothing.
    variables = environment(PYTHONPATH=os.pathsep.join((str(ROOT), str(tmp_path))))
    variables = {name: value for name, value in variables.items() if not name.startswith("PYTEST_")}

    def run(*options):
        command = ["-m", "pytest", "benchmarks", "-n0", "--threads=1", f"--benchmark-storage={tmp_path}"]
        command += ["-k", "rel_attention_2d and 8x8 and cpu and fwd", "--benchmark-max-time=0.1", *options]
        result = python(*command, env=variables)
        assert result.stdout.startswith("."), result.stdout + result.stderr
        assert "test_op[rel_attention_2d-8x8" in result.stdout
        return result

    # The shortest round, here: what else runs on the machine while the tests do shows in a median.
    limit = "--benchmark-compare-fail=min:100%"
    run("--benchmark-save=before")
    same = run("--benchmark-compare=0001", limit)
    assert same.returncode == 0, same.stdout + same.stderr
    slower = run("-p", "slower", "--benchmark-compare=0001", limit)
    assert slower.returncode != 0
    assert "Performance has regressed" in slower.stdout + slower.stderr
