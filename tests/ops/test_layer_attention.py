"""layer_attention: the equation, and its gradients, against einsum."""

import pytest
import torch

from fused_attn import _extension
from fused_attn.ops.layer_attention import layer_attention, weighted_layer_sum


def inputs(layers=3, batch=2, groups=3, depth=4, per_group=2, spatial=(3, 2), dtype=torch.float64):
    torch.manual_seed(0)
    query = torch.randn(batch, groups, depth, dtype=dtype)
    keys = [torch.randn(batch, groups, depth, dtype=dtype) for _ in range(layers)]
    values = [torch.randn(batch, groups * per_group, *spatial, dtype=dtype) for _ in range(layers)]
    return query, keys, values, torch.randn(layers, groups, dtype=dtype)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("layers", "spatial"), [(1, (3, 2)), (3, ()), (5, (4,))])
@pytest.mark.parametrize("with_bias", [False, True])
def test_equation_and_gradients(activation, layers, spatial, with_bias):
    query, keys, values, bias = inputs(layers, spatial=spatial)
    leaves = [tensor.requires_grad_() for tensor in (query, *keys, *values, bias)]
    logits = 0.3 * torch.einsum("bgd,lbgd->bgl", query, torch.stack(keys))
    if with_bias:
        logits = logits + bias.T
    weights = logits.softmax(-1) if activation == "softmax" else 1 / (1 + (-logits).exp())
    grouped = torch.stack(values).unflatten(2, (3, 2))
    expected = torch.einsum("bgl,lbgp...->bgp...", weights, grouped).flatten(1, 2)
    out = layer_attention(
        query, keys, values, scale=0.3, bias=bias if with_bias else None, activation=activation, impl="reference"
    )
    torch.testing.assert_close(out, expected)
    direction = torch.randn_like(out)
    torch.testing.assert_close(
        torch.autograd.grad(out, leaves, direction, materialize_grads=True),
        torch.autograd.grad(expected, leaves, direction, materialize_grads=True),
    )


def test_query_for_all_samples_and_default_scale():
    query, keys, values, _ = inputs()
    expected = layer_attention(query[:1].expand(2, -1, -1), keys, values, scale=0.5)
    torch.testing.assert_close(layer_attention(query[0], keys, values), expected)


@pytest.mark.skipif(not _extension.available(), reason="the C++ kernels are not built")
@pytest.mark.parametrize("grid", [(128, 130), (127, 131)], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_maps_too_large_for_the_caches(grid, memory_format):
    """They are written around the caches where rows are aligned."""
    weights = torch.rand(2, 4, 3, requires_grad=True)
    values = [torch.randn(2, 64, *grid).to(memory_format=memory_format).requires_grad_() for _ in range(3)]
    assert values[0].numel() * 4 >= 8 << 20
    grad_out = torch.randn(2, 64, *grid).to(memory_format=memory_format)
    results = []
    for impl in ("cpu", "reference"):
        out = weighted_layer_sum(weights, values, impl=impl)
        results.append((out, *torch.autograd.grad(out, [weights, *values], grad_out)))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
