"""The errors of long sums stay near the reference's, which sums in pairs: those over many keys and over many images."""

import pytest
import torch

from fused_attn import _extension, bias_attention_2d, rel_attention_2d
from fused_attn.ops._floor.declarations import convert
from fused_attn.testing.numerics import evaluate

pytestmark = [
    pytest.mark.usefixtures("capability"),
    pytest.mark.parametrize("capability", _extension.CPU_CAPABILITIES, indirect=True),
]


def relative_errors(function, inputs):
    """Root mean square errors of "cpu" as multiples of the reference's, by output and gradient."""
    grad_out = torch.randn_like(inputs["value"][:, :, :1, :1].expand(*inputs["query"].shape[:4], -1))
    exact = evaluate(function, {**convert(inputs, torch.float64), "impl": "reference"}, grad_out.double())
    errors = [
        {name: float((value - exact[name]).square().mean().sqrt()) for name, value in results.items()}
        for results in (evaluate(function, {**inputs, "impl": impl}, grad_out) for impl in ("cpu", "reference"))
    ]
    return {name: error / max(errors[1][name], 1e-30) for name, error in errors[0].items()}


@pytest.mark.parametrize("size", [4, 7, 12, 20])
def test_equal_weights(size):
    """Equal terms round alike at every addition."""
    grid = (8, 16, size, size, 8)
    query, key, value = torch.randn(8, 16, 2, 2, 8), torch.zeros(grid), torch.randn(grid)
    table = torch.zeros(16, size + 1, size + 1)
    table[:, size // 2, size // 2] = 3 * torch.rand(16)  # one key stands out
    inputs = {"query": query, "key": key, "value": value, "bias_table": table}
    assert relative_errors(bias_attention_2d, inputs)["out"] < 1.5


@pytest.mark.parametrize("shared", [False, True])
def test_tables_of_many_images(shared):
    grids = dict(zip(("query", "key", "value"), torch.randn(3, 1024, 6, 3, 3, 4).unbind(), strict=True))
    biases = relative_errors(bias_attention_2d, {**grids, "bias_table": torch.randn(6, 5, 5)})
    tables = torch.randn(2, 5, 4) if shared else torch.randn(2, 6, 5, 4)
    errors = relative_errors(rel_attention_2d, {**grids, "rel_h": tables[0], "rel_w": tables[1]})
    assert max(biases["grad_bias_table"], errors["grad_rel_h"], errors["grad_rel_w"]) < 2
