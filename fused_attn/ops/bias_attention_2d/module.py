"""Modules: attention within windows of a feature map, and over a coarse grid of it."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._floor import checks, sharding
from .._floor.positions import Positions, PositionTables
from .._floor.tracing import leaf, pinned
from ..rel_attention_2d import op
from .api import bias_attention_2d


class _TableAttention(PositionTables):
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
        resize_tables: bool = False,
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        checks.positive(heads=heads)
        if dim < 1 or dim % heads:
            raise ValueError(f"dim must be a positive multiple of heads={heads}, got {dim}")
        size = _size(self.size_name, window)
        op.check_options(dropout_p, impl)

        self.dim, self.heads, self.window = dim, heads, size
        self.dropout_p = dropout_p
        self.resize_tables = resize_tables
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

    def position_tables(self) -> dict[str, Positions]:
        return {"relative_position_bias_table": Positions(self.window, 0, "bicubic")}

    def bias_table(self, size: tuple[int, int] | None = None) -> Tensor:
        """The table as the op takes it, (heads, 2h-1, 2w-1): a view where it is not interpolated.

        Args:
            size: (h, w) of another window.  Of a smaller one: the central part of the table, which belongs to its
                relative positions; with ``resize_tables``, of any size: the whole table, interpolated.
        """
        positions = self.position_tables()["relative_position_bias_table"]
        window = self.window if size is None else size
        return _table_for(self.relative_position_bias_table, positions, window, self.resize_tables)

    def attend(self, windows: Tensor, segments: Tensor | None = None) -> Tensor:
        """Attend within windows, (N, h, w, dim) -> (N, h, w, out_dim), for which :meth:`bias_table` has a table.

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

    def positions(
        self,
        grid: Sequence[int],
        size: int | tuple[int, int] | None = None,
        device: torch.device | None = None,
    ) -> Tensor:
        """Where the positions of the windows lie on the map that is cut.

        Args:
            grid: (H, W) of the map.
            size: of the call's windows or grids, as in ``forward``.
            device: of the result.

        Returns:
            (windows of an image, h, w), int64: y * W + x, and -1 for padding.
        """
        places = torch.arange(1, grid[0] * grid[1] + 1, device=device).view(1, 1, *grid)
        return self._windows(places, size)[0].squeeze(-1) - 1

    def _windows(self, x: Tensor, size: int | tuple[int, int] | None) -> tuple[Tensor, Tensor | None]:
        """The windows of maps (B, C, H, W), side by side, (B * windows of an image, h, w, C), and their segments."""
        raise NotImplementedError  # it is what the modules differ in

    def extra_repr(self) -> str:
        resize = "resize_tables=True, " if self.resize_tables else ""
        options = f"{resize}dropout_p={self.dropout_p}, impl={self.impl!r}"
        return f"heads={self.heads}, {self.size_name}={self.window}, {options}"


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
        resize_tables: whether windows of another size, larger or smaller, use the whole table, interpolated bicubically
            to theirs as in Swin's code.
        impl: implementation of the op; not part of the state dict, so weights load across implementations.

    Shapes: input (B, dim, H, W), output (B, out_dim, H, W); any H and W from 1 on.

    Along an axis on which the input is not longer than the window, there is one window of its length, without a shift,
    and the central part of the table is used (or, with ``resize_tables``, all of it, interpolated): with a window as
    large as the largest map, this is attention over the whole map (CoAtNet).  Otherwise an input that is no multiple of
    the window is padded with zeros at the bottom and on the right, as in Swin: after the linear layer a padded position
    has the layer's bias as key and value, and takes part.

    Raises:
        ValueError: an argument is out of range, the input has the wrong shape or, without ``resize_tables``, a call's
            window is larger than the module's.

    Parameters have the names and layouts of Swin's published weights.  The table starts at a truncated normal
    distribution of standard deviation 0.02.  One of another window loads after
    :func:`~fused_attn.modules.resize_state_dict`.
    Source: Liu et al. 2021, "Swin Transformer", section 3.2.
    """

    def __init__(
        self, dim: int, heads: int, window: int | tuple[int, int], shift: int | tuple[int, int] = 0, **options: Any
    ) -> None:
        super().__init__(dim, heads, window, **options)
        self.shift = _pair(shift)
        if len(self.shift) != 2 or not all(0 <= s < w for s, w in zip(self.shift, self.window, strict=True)):
            raise ValueError(f"shift must be from 0 to less than window={self.window} along each axis, got {shift}")

    def forward(self, x: Tensor, window: int | tuple[int, int] | None = None) -> Tensor:
        """Attend within the windows of x, (B, dim, H, W) -> (B, out_dim, H, W).

        Args:
            x: the map.
            window: (h, w) of this call's windows, or one number for both; those of the module when None.
        """
        checks.feature_map(x, self.dim)
        windows, segments = self._windows(x, window)
        return _join(self.attend(windows, segments), x, self.window, self.shift, window)

    def _windows(self, x: Tensor, size: int | tuple[int, int] | None) -> tuple[Tensor, Tensor | None]:
        return _cut(x, self.window, self.shift, size)

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
        bias, dropout_p, out_dim, resize_tables, impl: as in :class:`WindowAttention2d`.

    Shapes: input (B, dim, H, W), output (B, out_dim, H, W); H and W are multiples of the grid's.

    Raises:
        ValueError: an argument is out of range, the input has the wrong shape or, without ``resize_tables``, a call's
            grid is larger than the module's.

    Source: Tu et al. 2022, "MaxViT: Multi-Axis Vision Transformer", section 3.2.
    """

    size_name = "grid"

    def __init__(self, dim: int, heads: int, grid: int | tuple[int, int], **options: Any) -> None:
        super().__init__(dim, heads, grid, **options)

    def forward(self, x: Tensor, grid: int | tuple[int, int] | None = None) -> Tensor:
        """Attend over the grids of x, (B, dim, H, W) -> (B, out_dim, H, W).

        Args:
            x: the map.
            grid: (h, w) positions of this call's grids, or one number for both; those of the module when None.
        """
        checks.feature_map(x, self.dim)
        return _join_grids(self.attend(self._windows(x, grid)[0]), x)

    def _windows(self, x: Tensor, size: int | tuple[int, int] | None) -> tuple[Tensor, Tensor | None]:
        return _cut_grids(x, self.window, size), None


def _size(name: str, number: Any) -> tuple[int, int]:
    whole: Any = (numbers.Integral, torch.SymInt)
    size = (number, number) if isinstance(number, whole) else number
    if torch.jit.is_tracing() and isinstance(size, Sequence):  # there, sizes of tensors are tensors
        size = [int(length) if isinstance(length, Tensor) else length for length in size]
    if (
        not isinstance(size, Sequence)
        or len(size) != 2
        or not all(isinstance(length, whole) and length >= 1 for length in size)
    ):
        raise ValueError(f"{name} must be a positive number or two of them (h, w), got {number}")
    return size[0], size[1]


def _pair(number: int | Sequence[int]) -> tuple[int, ...]:
    return (number, number) if isinstance(number, int) else tuple(number)


@leaf
def _table_for(table: Tensor, positions: Positions, size: Sequence[int], resize: bool) -> Tensor:
    """A module's table for windows of ``size``, (heads, 2h-1, 2w-1): the central part, or all of it interpolated."""
    height, width = _size("size", size)
    full = positions.size
    if resize:
        full = height, width
        table = positions.resized(table, full)
    if height > full[0] or width > full[1]:
        raise ValueError(
            f"windows must be at most {full} large, got {(height, width)}; with resize_tables=True the table is "
            "interpolated"
        )
    table = table.unflatten(0, [2 * length - 1 for length in full])
    for axis, (most, length) in enumerate(zip(full, (height, width), strict=True)):
        table = table.narrow(axis, most - length, 2 * length - 1)
    return table.permute(2, 0, 1)


def _check_size(x: Tensor) -> None:
    if 0 in x.shape[2:]:
        raise ValueError(f"x must have a height and width of at least 1, got {tuple(x.shape)}")


def _partition(
    x: Tensor, own: Sequence[int], shift: Sequence[int], window: Any
) -> tuple[list[int], list[int], list[int]]:
    """Size, shift and numbers of the windows of a map (B, dim, H, W) along its axes."""
    grid, largest = x.shape[2:], _size("window", own if window is None else window)
    if not all(s < w for s, w in zip(shift, largest, strict=True)):
        raise ValueError(f"window must be larger than shift={tuple(shift)} along each axis, got {window}")
    sizes = [min(length, size) for length, size in zip(grid, largest, strict=True)]
    shifts = [s if length > size else 0 for s, length, size in zip(shift, grid, sizes, strict=True)]
    return sizes, shifts, [-(-length // size) for length, size in zip(grid, sizes, strict=True)]


@leaf
def _cut(x: Tensor, own: Sequence[int], shift: Sequence[int], window: Any) -> tuple[Tensor, Tensor | None]:
    """The windows of a map, (B, dim, H, W) to (B * windows, h, w, dim), side by side, and their segments."""
    _check_size(x)
    x = pinned(x)
    sizes, shifts, counts = _partition(x, own, shift, window)
    missing = [count * size - length for count, size, length in zip(counts, sizes, x.shape[2:], strict=True)]
    x = x.permute(0, 2, 3, 1)
    if any(missing):
        x = F.pad(x, (0, 0, 0, missing[1], 0, missing[0]))
    segments = None
    if any(shifts):
        x = x.roll((-shifts[0], -shifts[1]), (1, 2))
        segments = sharding.beside(x, shift_segments(counts, sizes, shifts, x.device))
    # (B, rows, h, columns, w, dim)
    x = x.unflatten(2, (counts[1], sizes[1])).unflatten(1, (counts[0], sizes[0]))
    return x.transpose(2, 3).flatten(0, 2), segments


@leaf
def _join(windows: Tensor, x: Tensor, own: Sequence[int], shift: Sequence[int], window: Any) -> Tensor:
    """The map (B, out_dim, H, W) of windows that :func:`_cut` made of ``x``."""
    _, shifts, counts = _partition(x, own, shift, window)
    out = windows.unflatten(0, (-1, counts[0], counts[1])).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    if any(shifts):
        out = out.roll(shifts, (1, 2))
    return out[:, : x.shape[2], : x.shape[3]].permute(0, 3, 1, 2)


@leaf
def _cut_grids(x: Tensor, own: Sequence[int], grid: Any) -> Tensor:
    """The grids of a map, (B, dim, H, W) to (B * grids of an image, h, w, dim), side by side."""
    _check_size(x)
    height, width = _size("grid", own if grid is None else grid)
    if x.shape[2] % height or x.shape[3] % width:
        raise ValueError(f"x must have multiples of grid={(height, width)} as height and width, got {tuple(x.shape)}")
    x = pinned(x).permute(0, 2, 3, 1).unflatten(2, (width, -1)).unflatten(1, (height, -1))
    return x.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)


@leaf
def _join_grids(grids: Tensor, x: Tensor) -> Tensor:
    """The map (B, out_dim, H, W) of grids that :func:`_cut_grids` made of ``x``."""
    cells = x.shape[2] // grids.shape[1], x.shape[3] // grids.shape[2]
    out = grids.unflatten(0, (-1, *cells)).permute(0, 3, 1, 4, 2, 5)
    return out.flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)


def shift_segments(counts: Sequence[int], window: Sequence[int], shift: Sequence[int], device: torch.device) -> Tensor:
    """Parts of shifted windows: (windows, h, w).  Only the last row and column of windows have several."""
    segments = torch.zeros(*counts, *window, dtype=torch.int32, device=device)
    segments[-1, :, window[0] - shift[0] :] += 2
    segments[:, -1, :, window[1] - shift[1] :] += 1
    return segments.flatten(0, 1)
