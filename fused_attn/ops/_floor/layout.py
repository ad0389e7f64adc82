"""Memory layout of tensors that the kernels allocate."""

from __future__ import annotations

import torch


def empty_like_heads(like: torch.Tensor, depth: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Allocate (B, heads, H, W, depth) in the memory order of ``like``, a (B, heads, H, W, d) tensor.

    The three orders that occur are kept, so that neither the gradient of a channels_last convolution nor that
    of a contiguous one needs a copy: (B, heads, d, H, W), (B, H, W, heads, d) and the contiguous one.
    """
    batch, heads, height, width, _ = like.shape
    dtype = like.dtype if dtype is None else dtype
    if like.stride(4) > like.stride(3):
        return like.new_empty((batch, heads, depth, height, width), dtype=dtype).permute(0, 1, 3, 4, 2)
    if like.stride(1) < like.stride(3):
        return like.new_empty((batch, height, width, heads, depth), dtype=dtype).permute(0, 3, 1, 2, 4)
    return like.new_empty((batch, heads, height, width, depth), dtype=dtype)
