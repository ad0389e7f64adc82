"""Samples and sizes of ``scale_rows``."""

import torch

from .._floor.declarations import Sample, Shape, unchanged
from . import api, op


def make(dtype, device, shape):
    x, scale = (torch.randn(s[::-1]).double().transpose(0, -1).to(device, dtype) for s in (shape, shape[:-1]))
    return {"x": x, "scale": scale}  # the first dimension is the innermost: not contiguous


def sample(*shape: int) -> Sample:
    return Sample(f"shape {shape}", lambda dtype, device: make(dtype, device, shape), small=shape == (2, 3, 5))


SIZES = tuple(Shape(f"{n} rows", sample(n, 384).make, memory_limit=24 * 384 * n) for n in (64, 512, 4096))
SPECS = (
    op.scale_rows.spec(
        api.scale_rows,
        autocast=unchanged,
        samples=(sample(2, 3, 5), sample(7), sample(0, 4), sample(3, 0), sample(9, 16), sample(3, 77), sample(2, 1030)),
        fuzz=lambda draw: sample(draw.randint(1, 9), draw.randint(1, 9), draw.choice((1, 7, 8, 16, 17, 33, 130))),
        shapes=SIZES,
        growth=SIZES,
    ),
)
