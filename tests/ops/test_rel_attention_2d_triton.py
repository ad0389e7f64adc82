"""The Triton implementation: numerics in the interpreter, and table products."""

import os
import pathlib
import subprocess
import sys

import pytest
import torch

from fused_attn.ops.rel_attention_2d import reference, relative_logits

ROOT = pathlib.Path(__file__).resolve().parents[2]


def run(*command: str, **variables: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    environment["PYTHONPATH"] = os.pathsep.join((str(ROOT), environment.get("PYTHONPATH", "")))
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.long
def test_kernels_in_the_interpreter():
    pytest.importorskip("triton")
    result = run("-m", "pytest", "-n0", "tests/ops/interpreted/rel_attention_2d.py", TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("key_minus_query", [True, False])
@pytest.mark.parametrize("per_head", [True, False])
@pytest.mark.parametrize("axis", [2, 3])
def test_table_products_and_their_gradients(axis, per_head, key_minus_query):
    torch.manual_seed(0)
    query = torch.randn(2, 3, 4, 5, 6, dtype=torch.float64)
    keys = 7
    table = torch.randn(*((3,) if per_head else ()), query.shape[axis] + keys - 1, 6, dtype=torch.float64)
    leaves = query.clone().requires_grad_(), table.clone().requires_grad_()
    index = "key_minus_query" if key_minus_query else "query_minus_key"
    tables = (leaves[1], None) if axis == 2 else (None, leaves[1])
    expected = reference.relative_logits(leaves[0], *tables, (keys, keys), 1.0, index)[axis - 2]
    actual = relative_logits.relative_logits(query, table, keys, axis, key_minus_query)
    torch.testing.assert_close(actual, expected)

    grad = torch.randn_like(expected)
    for got, want in zip(
        relative_logits.relative_logits_backward(grad, query, table, axis, key_minus_query),
        torch.autograd.grad(expected, leaves, grad),
        strict=True,
    ):
        # Window sums are taken in float32.
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
