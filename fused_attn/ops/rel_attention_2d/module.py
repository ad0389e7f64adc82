"""Modules: attention over a feature map, and a convolution augmented with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .._floor import checks
from .._floor.positions import Positions, PositionTables
from .._floor.tracing import leaf
from . import op
from .api import rel_attention_2d


class RelPosAttention2d(PositionTables):
    """Multi-head self-attention over a feature map, with relative position embeddings along height and width.

    One 1x1 convolution makes queries, keys and values; :func:`~fused_attn.rel_attention_2d` reads them where that
    convolution wrote them, in contiguous as in channels_last memory; a 1x1 convolution mixes the heads.

    Args:
        in_channels: channels of the input.
        key_channels: channels of queries and of keys, over all heads.
        value_channels: channels of values, over all heads; also of the output unless ``out_channels`` says otherwise.
        heads: number of heads; divides ``key_channels`` and ``value_channels``.
        size: (H, W) of the largest input; the tables are (2H-1, d_k) and (2W-1, d_k), d_k = key_channels / heads.  A
            smaller input uses their central rows, which belong to its relative positions.  Not used, and the input
            of any size, when ``relative`` is False.
        resize_tables: whether an input of another size, larger or smaller, uses all of the tables, interpolated
            linearly to its (2H'-1, d_k) and (2W'-1, d_k) as in SAM.
        relative: whether there are relative position embeddings.  Without them the attention is blind to position.
        per_head_tables: one table per head, (heads, 2H-1, d_k), instead of one for all heads.
        dropout_p: probability of dropping an attention weight in training, in [0, 1).
        bias: whether the two 1x1 convolutions have a bias.
        out_channels: channels of the output; ``value_channels`` when None.
        impl: implementation of the op; not part of the state dict, so weights load across implementations.

    Shapes: input (B, in_channels, H', W') with H' <= H and W' <= W, or any with ``resize_tables``; output
        (B, out_channels, H', W').

    Raises:
        ValueError: an argument is out of range, or the input has the wrong shape or, without ``resize_tables``, a grid
            larger than ``size``.

    Tables of another size load after :func:`~fused_attn.modules.resize_state_dict`.

    Source: Bello et al. 2019, "Attention Augmented Convolutional Networks", section 3; the tables start at a normal
    distribution of standard deviation d_k**-0.5, as there.
    """

    def __init__(
        self,
        in_channels: int,
        key_channels: int,
        value_channels: int,
        heads: int,
        size: tuple[int, int],
        *,
        relative: bool = True,
        per_head_tables: bool = False,
        dropout_p: float = 0.0,
        bias: bool = False,
        out_channels: int | None = None,
        resize_tables: bool = False,
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        checks.positive(heads=heads)
        for name, channels in (("key_channels", key_channels), ("value_channels", value_channels)):
            if channels < 1 or channels % heads:
                raise ValueError(f"{name} must be a positive multiple of heads={heads}, got {channels}")
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"size must be two positive numbers (H, W), got {size}")
        op.check_options(dropout_p, impl)

        self.in_channels, self.heads = in_channels, heads
        self.key_channels, self.value_channels = key_channels, value_channels
        self.size = tuple(size)
        self.dropout_p = dropout_p
        self.resize_tables = resize_tables
        self.impl = impl
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.qkv = nn.Conv2d(in_channels, 2 * key_channels + value_channels, 1, bias=bias, **options)
        self.proj = nn.Conv2d(value_channels, out_channels or value_channels, 1, bias=bias, **options)
        if relative:
            leading, depth = (heads,) if per_head_tables else (), key_channels // heads
            self.rel_h = nn.Parameter(torch.empty(*leading, 2 * size[0] - 1, depth, **options))
            self.rel_w = nn.Parameter(torch.empty(*leading, 2 * size[1] - 1, depth, **options))
        else:
            self.register_parameter("rel_h", None)
            self.register_parameter("rel_w", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw fresh parameters: PyTorch's default for the convolutions, normal for the tables."""
        self.qkv.reset_parameters()
        self.proj.reset_parameters()
        for table in (self.rel_h, self.rel_w):
            if table is not None:
                nn.init.normal_(table, std=table.shape[-1] ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Attend over all positions of x, (B, in_channels, H', W') -> (B, out_channels, H', W')."""
        checks.feature_map(x, self.in_channels)
        rel_h: Tensor | None = self.rel_h
        rel_w: Tensor | None = self.rel_w
        if rel_h is not None and rel_w is not None:
            rel_h, rel_w = _tables_for(rel_h, rel_w, self.position_tables(), self.resize_tables, x)
        query, key, value = self.qkv(x).split((self.key_channels, self.key_channels, self.value_channels), dim=1)
        out = rel_attention_2d(
            self._split_heads(query),
            self._split_heads(key),
            self._split_heads(value),
            rel_h,
            rel_w,
            dropout_p=self.dropout_p if self.training else 0.0,
            impl=self.impl,
        )
        return self.proj(out.permute(0, 1, 4, 2, 3).flatten(1, 2))

    def _split_heads(self, x: Tensor) -> Tensor:
        """View (B, heads*d, H, W) as (B, heads, H, W, d)."""
        return x.unflatten(1, (self.heads, -1)).permute(0, 1, 3, 4, 2)

    def position_tables(self) -> dict[str, Positions]:
        if self.rel_h is None:
            return {}
        height, width = self.size
        return {"rel_h": Positions((height,), -2, "linear"), "rel_w": Positions((width,), -2, "linear")}

    def extra_repr(self) -> str:
        tables = "none" if self.rel_h is None else "per head" if self.rel_h.dim() == 3 else "shared"
        resize = ", resize_tables=True" if self.resize_tables else ""
        options = f"tables={tables}{resize}, dropout_p={self.dropout_p}, impl={self.impl!r}"
        return f"heads={self.heads}, size={self.size}, {options}"


@leaf
def _tables_for(
    rel_h: Tensor, rel_w: Tensor, positions: Mapping[str, Positions], resize: bool, x: Tensor
) -> tuple[Tensor, Tensor]:
    """The tables for the grid of ``x``: their central rows, or all of them interpolated."""
    height, width = x.shape[2:]
    if height < 1 or width < 1:
        raise ValueError(f"x must have a height and width of at least 1, got {tuple(x.shape)}")
    if resize:
        return positions["rel_h"].resized(rel_h, (height,)), positions["rel_w"].resized(rel_w, (width,))
    full = *positions["rel_h"].size, *positions["rel_w"].size
    if height > full[0] or width > full[1]:
        raise ValueError(
            f"x must have a grid (H, W) of at most size={full}, for which the relative position tables were built, "
            f"got {(height, width)}; with resize_tables=True they are interpolated"
        )
    # Row k - q + size - 1 of the full table is row k - q + length - 1 of this slice.
    rel_h, rel_w = (
        table.narrow(-2, size - length, 2 * length - 1)
        for table, size, length in zip((rel_h, rel_w), full, (height, width), strict=True)
    )
    return rel_h, rel_w


class AttentionAugmentedConv2d(nn.Module):
    """Convolution whose last output channels come from self-attention over the whole feature map.

    ``out = cat(conv(x), attention(x))`` along the channels: d_v channels of attention, out_channels - d_v of
    convolution.  Depths per head, from Bello et al. 2019, section 4: d_k = max(key_ratio * out_channels / heads,
    min_key_depth) and d_v = value_ratio * out_channels / heads, rounded down, and at least 1.  The lower bound of 1
    matters in networks narrower than the paper's (fewer than heads / value_ratio channels), where a head would
    otherwise be left without any value.

    With a stride of 2 the attention works on the grid of the output: its input passes a 3x3 average pooling of stride 2
    first (for other strides, one of size 2 * stride - 1).  The paper leaves strided augmented convolutions open, but
    lowers the resolution of attention inputs with just this pooling (section 3.3).  It lets every input position take
    part; the other way in use, a strided 1x1 convolution, ignores three out of four.  Pooling and 1x1 convolution
    commute; pooling first is cheaper.

    Args:
        in_channels, out_channels: channels of input and output.
        kernel_size: of the convolution; odd.  Padding is ``kernel_size // 2``.
        stride: of the convolution and, by pooling, of the attention.
        size: (H, W) of the largest *output*, the grid that the attention sees.
        heads: attention heads.
        key_ratio: kappa of the paper, key channels per output channel.
        value_ratio: upsilon of the paper, value channels per output channel.
        min_key_depth: least d_k per head.
        relative, per_head_tables, dropout_p, resize_tables, impl: as in :class:`RelPosAttention2d`.
        bias: whether the convolution and the attention's 1x1 convolutions have a bias.

    Shapes: input (B, in_channels, H, W), output (B, out_channels, ceil(H / stride), ceil(W / stride)).

    Raises:
        ValueError: an argument is out of range, or the values take all output channels.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int,
        size: tuple[int, int],
        *,
        heads: int = 8,
        key_ratio: float = 0.2,
        value_ratio: float = 0.1,
        min_key_depth: int = 20,
        relative: bool = True,
        per_head_tables: bool = False,
        dropout_p: float = 0.0,
        bias: bool = False,
        resize_tables: bool = False,
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        checks.positive(heads=heads)
        key_channels, value_channels = augmented_depths(out_channels, heads, key_ratio, value_ratio, min_key_depth)
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.conv, self.pool = convolution_and_pool(
            nn.Conv2d, nn.AvgPool2d, in_channels, out_channels - value_channels, kernel_size, stride, bias, **options
        )
        self.attention = RelPosAttention2d(
            in_channels,
            key_channels,
            value_channels,
            heads,
            size,
            relative=relative,
            per_head_tables=per_head_tables,
            dropout_p=dropout_p,
            bias=bias,
            resize_tables=resize_tables,
            impl=impl,
            **options,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Convolve and attend, (B, in_channels, H, W) -> (B, out_channels, ceil(H / stride), ceil(W / stride))."""
        return torch.cat((self.conv(x), self.attention(self.pool(x))), dim=1)


def convolution_and_pool(
    convolution: type[nn.Module],
    pool: type[nn.Module],
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    stride: int,
    bias: bool,
    **options: Any,
) -> tuple[nn.Module, nn.Module]:
    """A padded convolution, and what takes its input to its grid for the attention beside it.

    Raises:
        ValueError: ``kernel_size`` is not odd, or a number is not positive.
    """
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be a positive odd number, got {kernel_size}")
    checks.positive(stride=stride)
    conv = convolution(in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=bias, **options)
    if stride == 1:
        return conv, nn.Identity()
    # 2 * stride - 1 is the least odd kernel that reaches every position of any input on the convolution's grid.
    return conv, pool(2 * stride - 1, stride, padding=stride - 1, count_include_pad=False)


def augmented_depths(
    out_channels: int, heads: int, key_ratio: float, value_ratio: float, min_key_depth: int
) -> tuple[int, int]:
    """Key and value channels of an augmented convolution, over all heads.

    Raises:
        ValueError: the values take all output channels.
    """
    key_channels = heads * max(_depth(out_channels, key_ratio, heads), min_key_depth)
    value_channels = heads * _depth(out_channels, value_ratio, heads)
    if value_channels >= out_channels:
        raise ValueError(
            f"the values, heads * d_v = {value_channels} channels, must leave some of out_channels={out_channels} "
            f"to the convolution: use a smaller value_ratio than {value_ratio} or fewer heads than {heads}"
        )
    return key_channels, value_channels


def _depth(channels: int, ratio: float, heads: int) -> int:
    # 0.29 * 200 / 2 is 29, though its binary rounding lies just below.
    return max(int(ratio * channels / heads + 1e-6), 1)
