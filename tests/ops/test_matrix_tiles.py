"""Attention on matrix tiles: which calls and numbers take them, and their bits.  Errors are in test_op_contract.py."""

import math

import pytest
import torch
from instruction_sets import instruction_set

from fused_attn import _extension, bias_attention_2d, rel_attention_2d
from fused_attn.ops.rel_attention_2d.spec import SPECS
from fused_attn.testing import checks

pytestmark = pytest.mark.skipif(
    not _extension.available() or _extension.cpu_capability() != "amx", reason="this processor has no matrix tiles"
)

TABLES = ("rel_h", "rel_w")


def call(dtype=torch.float32, size=6, depth=40, value_depth=24):
    torch.manual_seed(0)
    sizes = dict.fromkeys(("query", "key"), (2, 2, size, size, depth))
    sizes |= dict.fromkeys(("value", "grad_out"), (2, 2, size, size, value_depth))
    sizes |= dict.fromkeys(TABLES, (2, 2 * size - 1, depth))
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
        if output in TABLES:  # sums over heads of both kinds
            torch.testing.assert_close(tensor, expected[output], rtol=1e-4, atol=1e-4, equal_nan=True)
            continue
        assert same(tensor[1, 1], expected[output][1, 1]) or (name, output) == ("grad_out", "out")
        assert not torch.equal(tensor[1, 0], expected[output][1, 0])
        assert torch.equal(tensor[:, 0], before[output][:, 0])


@pytest.mark.parametrize(
    "scales",
    [
        *({name: 1e-36} for name in call() if "prefix" not in name),
        {"query": 1e25, "key": 1e25},  # logits beyond float32
        {"query": 1e25, "rel_h": 1e25},
        {"value": 1e-18, "grad_out": 1e-16},  # small parts of their products would be taken for zero
        {"value": 1e25, "grad_out": 1e25},
        {"query": 1e3, "key": 1e3, "grad_out": 1e-36},  # weights of such logits are 0 or 1
    ],
    ids=str,
)
def test_scales_without_parts(scales):
    inputs = {name: tensor for name, tensor in call().items() if "prefix" not in name}
    for name, scale in scales.items():
        inputs[name] *= scale
    found, expected = evaluated_with("amx", inputs), evaluated_with("avx512", inputs)
    assert all(same(found[output], expected[output]) for output in found if output != "out" or "grad_out" not in scales)
    for name in scales:
        inputs[name][..., 0] = 1.0
        inputs[name].clamp_(-1.0, 1.0)
    found = evaluated_with("amx", inputs)
    assert not any(same(found[output], expected[output]) for output in found)


def test_images_that_share_a_task():
    """With a bias table, images of a head share a task; the logits, large here, are those of the forward pass."""
    torch.manual_seed(0)
    query, key, value, grad_out = (torch.randn(150, 2, 5, 5, 32) for _ in range(4))
    query *= 1e4
    value[7, 1, 2, 3, 4] = math.inf
    leaves = [tensor.requires_grad_() for tensor in (query, key, value, torch.randn(2, 9, 9))]
    gradients = []
    for instructions in ("amx", "avx512"):
        with instruction_set(instructions):
            out = bias_attention_2d(*leaves, impl="cpu")
            gradients.append(torch.autograd.grad(out, leaves, grad_out))
    for found, expected in zip(*gradients, strict=True):
        close = torch.isclose(found, expected, rtol=1e-3, atol=1e-3 * float(expected.nan_to_num(0, 0, 0).abs().max()))
        # two logits of 1e5 that round alike or not: a few weights differ
        assert (close | found.isnan() & expected.isnan()).float().mean() > 0.97


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
