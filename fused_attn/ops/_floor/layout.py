"""Memory layout of tensors that the kernels read and allocate."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def empty_like_heads(like: torch.Tensor, depth: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Allocate (B, heads, H, W, depth) in the memory order of ``like``, a (B, heads, H, W, d) tensor.

    The three orders that occur are kept, so that neither the gradient of a channels_last convolution nor that
    of a contiguous one needs a copy: (B, heads, d, H, W), (B, H, W, heads, d) and the contiguous one.
    """
    batch, heads, height, width, like_depth = like.shape
    if depth == like_depth and dtype is None and like.is_contiguous():
        return torch.empty_like(like)
    dtype = like.dtype if dtype is None else dtype
    if like.stride(4) > like.stride(3):
        return like.new_empty(batch, heads, depth, height, width, dtype=dtype).permute(0, 1, 3, 4, 2)
    if like.stride(1) < like.stride(3):
        return like.new_empty(batch, height, width, heads, depth, dtype=dtype).permute(0, 3, 1, 2, 4)
    return like.new_empty(batch, heads, height, width, depth, dtype=dtype)


def empty_contiguous(like: torch.Tensor) -> torch.Tensor:
    """Allocate a contiguous tensor of the shape of ``like``: in half the time that ``new_empty`` takes."""
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def rows(tensor: torch.Tensor) -> torch.Tensor:
    """View (..., D) as (outer, inner, D) with contiguous rows; copies only where no such view exists."""
    if tensor.dim() != 3:
        tensor = tensor[(None,) * (3 - tensor.dim())] if tensor.dim() < 3 else tensor.flatten(0, -3)
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def memory_format(x: torch.Tensor) -> torch.memory_format:
    """Contiguous or channels_last, whichever (B, C, H, W) ``x`` is, or is nearer to."""
    if x.is_contiguous():
        return torch.contiguous_format
    if x.is_contiguous(memory_format=torch.channels_last) or x.stride(1) < x.stride(3):
        return torch.channels_last
    return torch.contiguous_format


def in_format(tensor: torch.Tensor | None, form: torch.memory_format) -> torch.Tensor | None:
    """``tensor`` itself where it lies so already, else a copy."""
    if tensor is None or tensor.is_contiguous(memory_format=form):
        return tensor
    return tensor.contiguous(memory_format=form)


def dense_order(value: torch.Tensor) -> tuple[int, ...]:
    """Dimensions behind the batch, outermost in memory first: channels first, or channels last."""
    dims = range(1, value.dim())
    if value.dim() > 2 and not _is_dense(value, dims) and _is_dense(value, (*dims[1:], 1)):
        return (*dims[1:], 1)
    return tuple(dims)


def is_channels_last(order: Sequence[int]) -> bool:
    return order[-1] == 1 and len(order) > 1


def _is_dense(value: torch.Tensor, order: Sequence[int]) -> bool:
    """Whether every image is one piece of memory, its dimensions in ``order``; the batch may have any stride."""
    if order[-1] == value.dim() - 1 and value.is_contiguous():
        return True
    expected = 1
    for dim in reversed(order):
        if value.shape[dim] != 1 and value.stride(dim) != expected:
            return False
        expected *= value.shape[dim]
    return True


def empty_in_order(like: torch.Tensor, order: Sequence[int]) -> torch.Tensor:
    """Allocate a tensor of the shape of ``like`` whose dimensions lie in :func:`dense_order` ``order``."""
    strides, step = [0] * like.dim(), 1
    for dim in reversed((0, *order)):
        strides[dim] = step
        step *= max(like.shape[dim], 1)
    return like.new_empty_strided(like.shape, strides)


def in_order(value: torch.Tensor, order: Sequence[int]) -> torch.Tensor:
    """``value`` itself where it lies so already, else a copy."""
    return value if _is_dense(value, order) else empty_in_order(value, order).copy_(value)
