"""Modules for sequences: attention with relative positions, and a convolution augmented with it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .._floor import checks
from .._floor.positions import Positions, PositionTables
from .._floor.tracing import leaf
from . import op
from .module import augmented_depths, convolution_and_pool
from .one_dimension import check_padding, rel_attention_1d


class RelPosAttention1d(PositionTables):
    """Multi-head self-attention over a sequence of channels, with relative position embeddings.

    One 1x1 convolution makes queries, keys and values, which :func:`~fused_attn.rel_attention_1d` reads where it wrote
    them; another mixes the heads.

    Args:
        in_channels: channels of the input.
        key_channels: channels of queries and of keys, over all heads.
        value_channels: channels of values, over all heads; also of the output unless ``out_channels`` says otherwise.
        heads: number of heads; divides ``key_channels`` and ``value_channels``.
        length: of the longest input; the table is (2 * length - 1, d_k), d_k = key_channels / heads.  A shorter input
            uses its central rows, which belong to its relative positions.  Not used, and the input of any length, when
            ``relative`` is False.
        resize_tables: whether an input of another length, larger or smaller, uses all of the table, interpolated
            linearly to its (2L'-1, d_k).
        relative: whether there are relative position embeddings.  Without them the attention is blind to position.
        per_head_tables: one table per head, (heads, 2 * length - 1, d_k), instead of one for all heads.
        dropout_p: probability of dropping an attention weight in training, in [0, 1).
        bias: whether the two 1x1 convolutions have a bias.
        out_channels: channels of the output; ``value_channels`` when None.
        impl: implementation of the op; not part of the state dict, so weights load across implementations.

    Shapes: input (B, in_channels, L) with L <= length, or any with ``resize_tables``; output (B, out_channels, L).

    Raises:
        TypeError: the padding is not a bool tensor.
        ValueError: an argument is out of range, the input has the wrong shape or, without ``resize_tables``, is longer
            than ``length``.

    Source: Bello et al. 2019, "Attention Augmented Convolutional Networks", section 3, in one dimension; the table
    starts at a normal distribution of standard deviation d_k**-0.5, as there.
    """

    def __init__(
        self,
        in_channels: int,
        key_channels: int,
        value_channels: int,
        heads: int,
        length: int,
        *,
        relative: bool = True,
        per_head_tables: bool = False,
        dropout_p: float = 0.0,
        resize_tables: bool = False,
        bias: bool = False,
        out_channels: int | None = None,
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        checks.positive(heads=heads, length=length)
        for name, channels in (("key_channels", key_channels), ("value_channels", value_channels)):
            if channels < 1 or channels % heads:
                raise ValueError(f"{name} must be a positive multiple of heads={heads}, got {channels}")
        op.check_options(dropout_p, impl)

        self.in_channels, self.heads, self.length = in_channels, heads, length
        self.key_channels, self.value_channels = key_channels, value_channels
        self.dropout_p = dropout_p
        self.resize_tables = resize_tables
        self.impl = impl
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.qkv = nn.Conv1d(in_channels, 2 * key_channels + value_channels, 1, bias=bias, **options)
        self.proj = nn.Conv1d(value_channels, out_channels or value_channels, 1, bias=bias, **options)
        if relative:
            leading = (heads,) if per_head_tables else ()
            table = torch.empty(*leading, 2 * length - 1, key_channels // heads, **options)
            self.rel_table: nn.Parameter | None = nn.Parameter(table)
        else:
            self.register_parameter("rel_table", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw fresh parameters: PyTorch's default for the convolutions, normal for the table."""
        self.qkv.reset_parameters()
        self.proj.reset_parameters()
        if self.rel_table is not None:
            nn.init.normal_(self.rel_table, std=self.rel_table.shape[-1] ** -0.5)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        """Attend over all positions of x, (B, in_channels, L) -> (B, out_channels, L).

        Args:
            x: (B, in_channels, L); finite at padded positions too.
            padding: (B, L), bool: True at positions that nothing attends to.  The output there is to be ignored.
        """
        _check(x, self.in_channels, padding)
        rel_table: Tensor | None = self.rel_table
        if rel_table is not None:
            rel_table = _table_for(rel_table, self.position_tables()["rel_table"], self.resize_tables, x)
        query, key, value = self.qkv(x).split((self.key_channels, self.key_channels, self.value_channels), dim=1)
        out = rel_attention_1d(
            self._split_heads(query),
            self._split_heads(key),
            self._split_heads(value),
            rel_table,
            key_padding=padding,
            dropout_p=self.dropout_p if self.training else 0.0,
            impl=self.impl,
        )
        return self.proj(out.transpose(2, 3).flatten(1, 2))

    def _split_heads(self, x: Tensor) -> Tensor:
        """View (B, heads*d, L) as (B, heads, L, d)."""
        return x.unflatten(1, (self.heads, -1)).transpose(2, 3)

    def position_tables(self) -> dict[str, Positions]:
        return {} if self.rel_table is None else {"rel_table": Positions((self.length,), -2, "linear")}

    def extra_repr(self) -> str:
        table = "none" if self.rel_table is None else "per head" if self.rel_table.dim() == 3 else "shared"
        resize = ", resize_tables=True" if self.resize_tables else ""
        options = f"table={table}{resize}, dropout_p={self.dropout_p}, impl={self.impl!r}"
        return f"heads={self.heads}, length={self.length}, {options}"


@leaf
def _check(x: Tensor, channels: int, padding: Tensor | None) -> None:
    if x.dim() != 3 or x.shape[1] != channels:
        raise ValueError(f"x must have shape (B, {channels}, L), got {tuple(x.shape)}")
    if x.shape[2] == 0:
        raise ValueError(f"x must have a length of at least 1, got {tuple(x.shape)}")
    if padding is not None:
        check_padding("padding", padding, x.shape[0], x.shape[2], x.device)


@leaf
def _table_for(rel_table: Tensor, positions: Positions, resize: bool, x: Tensor) -> Tensor:
    """The table for the length of ``x``: its central rows, or all of them interpolated."""
    length, longest = x.shape[2], positions.size[0]
    if resize:
        return positions.resized(rel_table, (length,))
    if length > longest:
        raise ValueError(
            f"x must have a length of at most {longest}, for which the relative position table was built, got {length}"
            "; with resize_tables=True it is interpolated"
        )
    return rel_table.narrow(-2, longest - length, 2 * length - 1)


class AttentionAugmentedConv1d(nn.Module):
    """Convolution over a sequence whose last output channels come from self-attention over all of it.

    ``out = cat(conv(x), attention(x))`` along the channels, with the depths per head and the pooling of
    :class:`AttentionAugmentedConv2d`.

    Args:
        in_channels, out_channels: channels of input and output.
        kernel_size: of the convolution; odd.  Padding is ``kernel_size // 2``.
        stride: of the convolution and, by pooling, of the attention.
        length: of the longest *output*, the sequence that the attention sees.
        heads, key_ratio, value_ratio, min_key_depth: as in :class:`AttentionAugmentedConv2d`.
        relative, per_head_tables, dropout_p, resize_tables, impl: as in :class:`RelPosAttention1d`.
        bias: whether the convolution and the attention's 1x1 convolutions have a bias.

    Shapes: input (B, in_channels, L), output (B, out_channels, ceil(L / stride)).

    Raises:
        TypeError: the padding is not a bool tensor.
        ValueError: an argument is out of range, the values take all output channels, or the input has the wrong shape
            or, without ``resize_tables``, gives an output longer than ``length``.

    Source: Bello et al. 2019, "Attention Augmented Convolutional Networks", section 3, in one dimension.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int,
        length: int,
        *,
        heads: int = 8,
        key_ratio: float = 0.2,
        value_ratio: float = 0.1,
        min_key_depth: int = 20,
        relative: bool = True,
        per_head_tables: bool = False,
        dropout_p: float = 0.0,
        resize_tables: bool = False,
        bias: bool = False,
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        checks.positive(heads=heads)
        key_channels, value_channels = augmented_depths(out_channels, heads, key_ratio, value_ratio, min_key_depth)
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.conv, self.pool = convolution_and_pool(
            nn.Conv1d, nn.AvgPool1d, in_channels, out_channels - value_channels, kernel_size, stride, bias, **options
        )
        self.attention = RelPosAttention1d(
            in_channels,
            key_channels,
            value_channels,
            heads,
            length,
            relative=relative,
            per_head_tables=per_head_tables,
            dropout_p=dropout_p,
            resize_tables=resize_tables,
            bias=bias,
            impl=impl,
            **options,
        )

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        """Convolve and attend, (B, in_channels, L) -> (B, out_channels, ceil(L / stride)).

        Args:
            x: (B, in_channels, L).  The convolution reads padded positions as they are: zeros, as a rule.
            padding: (B, ceil(L / stride)), bool: True at positions of the *output* that nothing attends to.
        """
        return torch.cat((self.conv(x), self.attention(self.pool(x), padding)), dim=1)
