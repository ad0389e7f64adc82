"""attention_residual's modules: the equation, the block form and the README's example."""

import pytest
import torch
import torch.nn.functional as F

from fused_attn import _extension, attention_residual
from fused_attn.modules import AttentionResidual, BlockSums


def expected(values, query, weight, eps):
    out = []
    for token in range(values[0].shape[0]):
        rows = torch.stack([value[token] for value in values])
        keys = rows / (rows.square().mean(1, keepdim=True) + eps).sqrt() * weight
        out.append(torch.softmax(keys @ query, 0) @ rows)
    return torch.stack(out)


def test_module_computes_the_equation():
    module = AttentionResidual(6, eps=1e-3, dtype=torch.float64)
    values = [torch.randn(5, 6, dtype=torch.float64) for _ in range(4)]
    torch.testing.assert_close(module(values), sum(values) / 4)  # the query starts at zero
    torch.nn.init.normal_(module.query)
    torch.nn.init.normal_(module.norm_weight)
    torch.testing.assert_close(module(values), expected(values, module.query, module.norm_weight, 1e-3))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_block_form(size):
    dim, count = 8, 7
    layers = [torch.nn.Linear(dim, dim) for _ in range(count)]
    residuals = [AttentionResidual(dim) for _ in range(count)]
    for residual in residuals:
        torch.nn.init.normal_(residual.query)
    embedding = torch.randn(3, dim)

    values = BlockSums(embedding, size=size)
    for layer, residual in zip(layers, residuals, strict=True):
        values.append(layer(residual(values)))

    outputs = []
    for i, (layer, residual) in enumerate(zip(layers, residuals, strict=True)):
        groups = [outputs[start : start + size] for start in range(0, i, size)]
        seen = [embedding, *(torch.stack(group).sum(0) for group in groups)]
        outputs.append(layer(expected(seen, residual.query, residual.norm_weight, 1e-6)))
    assert len(values) == 1 + -(-count // size)
    torch.testing.assert_close(list(values)[-1], torch.stack(outputs[(count - 1) // size * size :]).sum(0))


def test_every_layer_learns():
    layers = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(4))
    residuals = torch.nn.ModuleList(AttentionResidual(8) for _ in layers)
    values = BlockSums(torch.randn(2, 3, 8), size=2)
    for layer, residual in zip(layers, residuals, strict=True):
        values.append(F.gelu(layer(residual(values))))
    sum(value.square().sum() for value in values).backward()
    # The first one has a single value to attend to.
    assert all(bool(residual.query.grad.any()) for residual in list(residuals)[1:])
    assert all(bool(layer.weight.grad.any()) for layer in layers)


def test_bad_settings():
    with pytest.raises(ValueError, match="dim must be at least 1, got 0"):
        AttentionResidual(0)
    with pytest.raises(ValueError, match=r"impl must be one of .* got 'fast'"):
        AttentionResidual(4, impl="fast")
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        BlockSums(torch.ones(2, 4), size=0)


@pytest.mark.skipif(not _extension.available(), reason="the C++ kernels are not built")
@pytest.mark.parametrize("depth", [1024, 1000, 1017])
def test_gradients_too_large_for_the_caches(depth):
    """They are streamed where rows are aligned: all, every second, few."""
    values = [torch.randn(300, depth, requires_grad=True) for _ in range(9)]
    query, weight = (torch.randn(depth, requires_grad=True) for _ in range(2))
    assert 9 * values[0].numel() * 4 >= 8 << 20
    grad_out, results = torch.randn(300, depth), []
    for impl in ("cpu", "reference"):
        out = attention_residual(values, query, norm_weight=weight, impl=impl)
        results.append((out, *torch.autograd.grad(out, [*values, query, weight], grad_out)))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.detach().abs().max()))
