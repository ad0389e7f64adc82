"""The Triton kernels in Triton's interpreter: each file of tests/ops/interpreted, and the grid of transforms."""

from pathlib import Path

import interpreter_server
import pytest

# What compiles is the same Python for every implementation, and takes minutes in the interpreter; of masks there is a
# file of its own.
QUICK = "test_cell and not compile and not linearize and not jacfwd and not jacrev and not hessian and not mask"
FILES = sorted((Path(__file__).parent / "interpreted").glob("*.py"))
RUNS = {**{path.stem: (str(path),) for path in FILES}, "transforms": ("tests/test_transforms.py", "-k", QUICK)}


@pytest.mark.long
@pytest.mark.parametrize("name", RUNS)
def test_kernels_in_the_interpreter(name):
    pytest.importorskip("triton")
    status, output = interpreter_server.run(*RUNS[name])
    assert status == 0, output
