"""Stages of layers for the tests of ``LayerCache``."""

import torch

B, G, C, D, SIDE = 2, 2, 8, 3, 5


def draw(layers, dtype=torch.float32, seed=0):
    """Queries, keys and values of a stage, all leaves."""
    torch.manual_seed(seed)

    def leaf(*shape):
        return torch.randn(shape, dtype=dtype).requires_grad_()

    return (
        [leaf(B, G, D) for _ in range(layers)],
        [leaf(B, G, D) for _ in range(layers)],
        [leaf(B, C, SIDE, SIDE) for _ in range(layers)],
    )


def total(outs, skip=()):
    """A loss over the outputs, every one weighted differently."""
    return sum((1 + i) * out.square().sum() for i, out in enumerate(outs) if i not in skip)


def assert_same(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
