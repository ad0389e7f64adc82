"""Attention on matrix tiles: which calls and numbers take them, and their bits.  Errors are in test_op_contract.py."""

import math

import pytest
import torch
from instruction_sets import instruction_set

from fused_attn import _extension, rel_attention_2d
from fused_attn.ops.rel_attention_2d.spec import SPECS
from fused_attn.testing import checks

pytestmark = pytest.mark.skipif(
    not _extension.available() or _extension.cpu_capability() != "amx", reason="this processor has no matrix tiles"
)

TABLES = ("rel_h", "rel_w")


def call(dtype=torch.float32, size=6, depth=40, value_depth=24):
    torch.manual_seed(0)
    sizes = {name: (2, 2, size, size, depth) for name in ("query", "key")}
    sizes |= {name: (2, 2, size, size, value_depth) for name in ("value", "grad_out")}
    sizes |= {name: (2, 2 * size - 1, depth) for name in TABLES}
    sizes |= {"prefix_key": (2, 2, 3, depth), "prefix_value": (2, 2, 3, value_depth)}
    return {name: torch.randn(sizes[name]).to(dtype) for name in sizes}


def evaluated(inputs):
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items() if name != "grad_out"}
    out = rel_attention_2d(**leaves, impl="cpu")
    out.backward(inputs["grad_out"])
    return {"out": out.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}


def evaluated_with(instructions, inputs):
    with instruction_set(instructions):
        return evaluated(inputs)


def same(a, b):
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(1.25), b.nan_to_num(1.25))


@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan, torch.finfo(torch.float32).max, -2e38])
@pytest.mark.parametrize("name", [*call()])
def test_numbers_without_parts(name, number):
    """Where parts cannot hold a number, its head is what it is without tiles; the others are what they were."""
    inputs = call()
    before = evaluated_with("amx", inputs)
    inputs[name][(1, 5, 7) if name in TABLES else (1, 1, 2, 7) if "prefix" in name else (1, 1, 2, 3, 7)] = number
    found, expected = evaluated_with("amx", inputs), evaluated_with("avx512", inputs)
    for output, tensor in found.items():
        if output in TABLES or name == "grad_out":  # sums over heads of both kinds; the forward pass took tiles
            torch.testing.assert_close(tensor, expected[output], rtol=1e-4, atol=1e-4, equal_nan=True)
        else:
            assert same(tensor[1, 1], expected[output][1, 1])
            assert not torch.equal(tensor[1, 0], expected[output][1, 0])
            assert torch.equal(tensor[:, 0], before[output][:, 0])


@pytest.mark.parametrize("name", ["query", "key", "value", *TABLES])
def test_tensors_of_tiny_numbers(name):
    inputs = call()
    inputs[name] *= 1e-36
    found, expected = evaluated_with("amx", inputs), evaluated_with("avx512", inputs)
    assert all(same(found[output], expected[output]) for output in found)
    inputs[name][..., 0] = 1.0  # not all of them: tiles, whose sums may lose what is far below the largest
    found = evaluated_with("amx", inputs)
    assert not any(same(found[output], expected[output]) for output in found)


def test_tiny_gradients():
    inputs = call()
    inputs["grad_out"] *= 1e-36
    found, expected = evaluated_with("amx", inputs), evaluated_with("avx512", inputs)
    for output, tensor in found.items():
        scale = 1.0 if output == "out" else 1e36
        torch.testing.assert_close(tensor * scale, expected[output] * scale, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_bits_at_any_number_of_threads(dtype):
    inputs = {name: tensor for name, tensor in call(dtype, size=20).items() if name != "grad_out"}
    with instruction_set("amx"):
        checks.check_deterministic(SPECS[0], "cpu", inputs, runs=1, threads=(1, 2, 3))


@pytest.mark.parametrize(
    ("dtype", "size", "depth", "tiles"),
    [
        (torch.float32, 32, 32, True),
        (torch.float32, 32, 16, False),
        (torch.float32, 31, 32, False),
        (torch.float16, 16, 32, True),
        (torch.float16, 16, 16, False),
        (torch.float16, 14, 32, False),
        (torch.bfloat16, 12, 32, True),
    ],
)
def test_what_takes_tiles(dtype, size, depth, tiles):
    inputs = call(dtype, size, depth, depth)
    out, with_tiles = evaluated(inputs)["out"], evaluated_with("amx", inputs)["out"]
    assert torch.equal(out, with_tiles) == tiles
