"""Modules: attention within windows of a feature map, and over a coarse grid of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._floor import checks
from .._floor.tracing import leaf, pinned
from ..rel_attention_2d import op
from .api import bias_attention_2d


class _TableAttention(nn.Module):
    """Multi-head self-attention of windows with a free bias for every head and relative position.

    The table lies as Swin, MaxViT and their published weights have it, positions by heads; the op takes it as a view.
    """

    size_name = "window"  # in the text of an error

    def __init__(
        self,
        dim: int,
        heads: int,
        window: int | tuple[int, int],
        *,
        bias: bool = True,
        dropout_p: float = 0.0,
        out_dim: int | None = None,
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        checks.positive(heads=heads)
        if dim < 1 or dim % heads:
            raise ValueError(f"dim must be a positive multiple of heads={heads}, got {dim}")
        size = _pair(window)
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"{self.size_name} must be a positive number or two of them (h, w), got {window}")
        op.check_options(dropout_p, impl)

        self.dim, self.heads, self.window = dim, heads, size
        self.dropout_p = dropout_p
        self.impl = impl
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias, **options)
        self.proj = nn.Linear(dim, out_dim or dim, bias=bias, **options)
        positions = (2 * size[0] - 1) * (2 * size[1] - 1)
        self.relative_position_bias_table = nn.Parameter(torch.empty(positions, heads, **options))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw fresh parameters: PyTorch's default for the linear layers, truncated normal for the table."""
        self.qkv.reset_parameters()
        self.proj.reset_parameters()
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def bias_table(self, size: tuple[int, int] | None = None) -> Tensor:
        """The table as the op takes it, a view (heads, 2h-1, 2w-1).

        Args:
            size: (h, w) of a smaller window: the central part of the table, which belongs to its relative positions.
        """
        return _central_part(self.relative_position_bias_table, self.window, self.window if size is None else size)

    def attend(self, windows: Tensor, segments: Tensor | None = None) -> Tensor:
        """Attend within windows, (N, h, w, dim) -> (N, h, w, out_dim), at most as large as ``window``.

        Args:
            windows: N windows.
            segments: (S, h, w), int32, S divides N: positions attend to those of their own segment.
        """
        query, key, value = self.qkv(windows).unflatten(-1, (3, self.heads, -1)).permute(3, 0, 4, 1, 2, 5)
        out = bias_attention_2d(
            query,
            key,
            value,
            self.bias_table((windows.shape[1], windows.shape[2])),
            query_segments=segments,
            key_segments=segments,
            dropout_p=self.dropout_p if self.training else 0.0,
            impl=self.impl,
        )
        return self.proj(out.permute(0, 2, 3, 1, 4).flatten(3))

    def extra_repr(self) -> str:
        return f"heads={self.heads}, {self.size_name}={self.window}, dropout_p={self.dropout_p}, impl={self.impl!r}"


class WindowAttention2d(_TableAttention):
    """Multi-head self-attention within windows of a feature map, shifted or not (Swin, the windows of MaxViT).

    Queries, keys and values come from one linear layer and are read where it wrote them.  In channels_last memory a map
    of one window is never copied; several windows are copied once on the way in and once on the way out, before the
    linear layer triples the channels and after the heads are mixed, and once more each way for every axis of a shift.

    Args:
        dim: channels of the input.
        heads: number of heads; divides ``dim``.
        window: (h, w) of a window, or one number for both.
        shift: (y, x), or one number for both, by which the windows are moved down and right against those that begin at
            the corner; less than ``window``.  A window that the far edge cuts goes on at the near edge; the two parts
            do not see each other.
        bias: whether the linear layers have a bias.
        dropout_p: probability of dropping an attention weight in training, in [0, 1).
        out_dim: channels of the output; ``dim`` when None.
        impl: implementation of the op; not part of the state dict, so weights load across implementations.

    Shapes: input (B, dim, H, W), output (B, out_dim, H, W); any H and W from 1 on.

    Along an axis on which the input is not longer than the window, there is one window of its length, without a shift,
    and the central part of the table is used: with a window as large as the largest map, this is attention over the
    whole map (CoAtNet).  Otherwise an input that is no multiple of the window is padded with zeros at the bottom and on
    the right, as in Swin: after the linear layer a padded position has the layer's bias as key and value, and takes
    part.

    Raises:
        ValueError: an argument is out of range, or the input has the wrong shape.

    Parameters have the names and layouts of Swin's published weights.  The table starts at a truncated normal
    distribution of standard deviation 0.02.
    Source: Liu et al. 2021, "Swin Transformer", section 3.2.
    """

    def __init__(
        self, dim: int, heads: int, window: int | tuple[int, int], shift: int | tuple[int, int] = 0, **options: Any
    ) -> None:
        super().__init__(dim, heads, window, **options)
        self.shift = _pair(shift)
        if len(self.shift) != 2 or not all(0 <= s < w for s, w in zip(self.shift, self.window, strict=True)):
            raise ValueError(f"shift must be from 0 to less than window={self.window} along each axis, got {shift}")

    def forward(self, x: Tensor) -> Tensor:
        """Attend within the windows of x, (B, dim, H, W) -> (B, out_dim, H, W)."""
        checks.feature_map(x, self.dim)
        windows, segments = _cut(x, self.window, self.shift)
        return _join(self.attend(windows, segments), x, self.window, self.shift)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, shift={self.shift}"


class GridAttention2d(_TableAttention):
    """Multi-head self-attention over coarse grids of a feature map (MaxViT).

    The map is cut into as many cells as the grid has positions, and the positions at the same place of all cells attend
    to each other.  After attention within windows, every position has then seen the whole map.

    Args:
        dim: channels of the input.
        heads: number of heads; divides ``dim``.
        grid: (h, w) positions of a grid, or one number for both.
        bias, dropout_p, out_dim, impl: as in :class:`WindowAttention2d`.

    Shapes: input (B, dim, H, W), output (B, out_dim, H, W); H and W are multiples of the grid's.

    Raises:
        ValueError: an argument is out of range, or the input has the wrong shape.

    Source: Tu et al. 2022, "MaxViT: Multi-Axis Vision Transformer", section 3.2.
    """

    size_name = "grid"

    def __init__(self, dim: int, heads: int, grid: int | tuple[int, int], **options: Any) -> None:
        super().__init__(dim, heads, grid, **options)

    def forward(self, x: Tensor) -> Tensor:
        """Attend over the grids of x, (B, dim, H, W) -> (B, out_dim, H, W)."""
        checks.feature_map(x, self.dim)
        _check_grid(x, self.window)
        height, width = self.window
        x = x.permute(0, 2, 3, 1).unflatten(2, (width, -1)).unflatten(1, (height, -1))
        cell = x.shape[2], x.shape[4]
        out = self.attend(x.permute(0, 2, 4, 1, 3, 5).flatten(0, 2))
        out = out.unflatten(0, (-1, *cell)).permute(0, 3, 1, 4, 2, 5)
        return out.flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)


def _pair(number: int | tuple[int, int]) -> tuple[int, ...]:
    return (number, number) if isinstance(number, int) else tuple(number)


@leaf
def _central_part(table: Tensor, window: Sequence[int], size: Sequence[int]) -> Tensor:
    """A module's table for windows of ``size``, a view (heads, 2h-1, 2w-1)."""
    if any(length > full for length, full in zip(size, window, strict=True)):
        raise ValueError(f"windows must be at most {window} large, got {tuple(size)}")
    table = table.unflatten(0, [2 * length - 1 for length in window])
    for axis, (full, length) in enumerate(zip(window, size, strict=True)):
        table = table.narrow(axis, full - length, 2 * length - 1)
    return table.permute(2, 0, 1)


def _check_size(x: Tensor) -> None:
    if 0 in x.shape[2:]:
        raise ValueError(f"x must have a height and width of at least 1, got {tuple(x.shape)}")


@leaf
def _check_grid(x: Tensor, grid: Sequence[int]) -> None:
    _check_size(x)
    if any(length % size for length, size in zip(x.shape[2:], grid, strict=True)):
        raise ValueError(f"x must have multiples of grid={grid} as height and width, got {tuple(x.shape)}")


def _partition(x: Tensor, window: Sequence[int], shift: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
    """Size, shift and numbers of the windows of a map (B, dim, H, W) along its axes."""
    grid = x.shape[2:]
    sizes = [min(length, size) for length, size in zip(grid, window, strict=True)]
    shifts = [s if length > size else 0 for s, length, size in zip(shift, grid, sizes, strict=True)]
    return sizes, shifts, [-(-length // size) for length, size in zip(grid, sizes, strict=True)]


@leaf
def _cut(x: Tensor, window: Sequence[int], shift: Sequence[int]) -> tuple[Tensor, Tensor | None]:
    """The windows of a map, (B, dim, H, W) to (B * windows, h, w, dim), side by side, and their segments."""
    _check_size(x)
    x = pinned(x)
    sizes, shifts, counts = _partition(x, window, shift)
    missing = [count * size - length for count, size, length in zip(counts, sizes, x.shape[2:], strict=True)]
    x = x.permute(0, 2, 3, 1)
    if any(missing):
        x = F.pad(x, (0, 0, 0, missing[1], 0, missing[0]))
    segments = None
    if any(shifts):
        x = x.roll((-shifts[0], -shifts[1]), (1, 2))
        segments = shift_segments(counts, sizes, shifts, x.device)
    # (B, rows, h, columns, w, dim)
    x = x.unflatten(2, (counts[1], sizes[1])).unflatten(1, (counts[0], sizes[0]))
    return x.transpose(2, 3).flatten(0, 2), segments


@leaf
def _join(windows: Tensor, x: Tensor, window: Sequence[int], shift: Sequence[int]) -> Tensor:
    """The map (B, out_dim, H, W) of windows that :func:`_cut` made of ``x``."""
    _, shifts, counts = _partition(x, window, shift)
    out = windows.unflatten(0, (-1, counts[0], counts[1])).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    if any(shifts):
        out = out.roll(shifts, (1, 2))
    return out[:, : x.shape[2], : x.shape[3]].permute(0, 3, 1, 2)


def shift_segments(counts: Sequence[int], window: Sequence[int], shift: Sequence[int], device: torch.device) -> Tensor:
    """Parts of shifted windows: (windows, h, w).  Only the last row and column of windows have several."""
    segments = torch.zeros(*counts, *window, dtype=torch.int32, device=device)
    segments[-1, :, window[0] - shift[0] :] += 2
    segments[:, -1, :, window[1] - shift[1] :] += 1
    return segments.flatten(0, 1)
