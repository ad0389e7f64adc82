"""Modules: element-wise attention over a feature map, the paper's layer around it, and dual softmax."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .._floor import checks
from .._floor.plain import is_plain
from .._floor.tracing import leaf
from . import op
from .api import check_options, elementwise_attention, row_col_softmax

_IMPLEMENTATIONS = ("auto", *op.elementwise_attention.can_run)


class ElementwiseAttention(nn.Module):
    """Element-wise attention heads, concatenated: :func:`~fused_attn.elementwise_attention` with its weights and state.

    Args:
        channels: channels C of the input.
        size: (H, W) of the input; every position has weights of its own.
        heads: number of heads.
        eps, momentum: of the batch normalisation ``norm``; ``momentum=None`` keeps a cumulative average.
        std: standard deviation of the normal distribution that the weights start from.
        impl: implementation of the op; not part of the state dict.

    Shapes: input (B, C, H, W), output (B, heads*C, H, W).

    The batch normalisation is the submodule ``norm``, a ``torch.nn.BatchNorm2d`` without affine parameters: its mode,
    momentum and statistics count, so that ``update_bn``, freezing by type and averaging of buffers find it.  The fused
    op reads it.  Where that would not be the same as calling it (``convert_sync_batchnorm``, another norm in its place,
    hooks: :mod:`~fused_attn.ops._floor.plain`) it is called on the :func:`~fused_attn.row_col_softmax`, which is then
    formed.  State dicts in which the statistics are the module's own buffers load as well.

    Raises:
        ValueError: an argument is out of range, or the input has the wrong shape.

    Source: Araujo Bacochina and de Souza 2023, "Element-Wise Attention Layers", section 2.2.
    """

    def __init__(
        self,
        channels: int,
        size: tuple[int, int],
        heads: int,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        std: float = 0.02,
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        checks.positive(channels=channels, heads=heads)
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"size must be two positive numbers (H, W), got {size}")
        checks.one_of("impl", impl, _IMPLEMENTATIONS)
        self.channels, self.size, self.heads = channels, tuple(size), heads
        self.std, self.impl = std, impl
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight_row = nn.Parameter(torch.empty(heads, channels, *size, **options))
        self.weight_col = nn.Parameter(torch.empty(heads, channels, *size, **options))
        self.norm = nn.BatchNorm2d(heads * channels, eps, momentum, affine=False, **options)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw fresh weights and forget the running statistics."""
        nn.init.normal_(self.weight_row, std=self.std)
        nn.init.normal_(self.weight_col, std=self.std)
        if hasattr(self.norm, "reset_parameters"):  # something else may have been put in its place
            self.norm.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Attend within rows and columns of x, (B, C, H, W) -> (B, heads*C, H, W)."""
        _check_shape(x, (self.channels, *self.size))
        norm = self.norm
        if not is_plain(norm, nn.BatchNorm2d) or norm.weight is not None:
            product = row_col_softmax(x, self.weight_row, self.weight_col, impl=self.impl)
            normalised = norm(product.flatten(1, 2)).unflatten(1, (self.heads, self.channels))
            return (normalised * x.unsqueeze(1)).flatten(1, 2)
        # What BatchNorm2d.forward makes of its state.
        kept, counted = not norm.training or norm.track_running_stats, norm.training and norm.track_running_stats
        return _attend(
            x,
            self.weight_row,
            self.weight_col,
            norm.running_mean if kept else None,
            norm.running_var if kept else None,
            norm.num_batches_tracked if counted else None,
            training=norm.training or norm.running_mean is None,
            momentum=norm.momentum,
            eps=norm.eps,
            impl=self.impl,
        )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # Where the statistics were before they had a module of their own.
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            if prefix + name in state_dict:
                state_dict[f"{prefix}norm.{name}"] = state_dict.pop(prefix + name)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        return f"{self.channels}, size={self.size}, heads={self.heads}, impl={self.impl!r}"


@leaf
def _check_shape(x: Tensor, shape: tuple[int, ...]) -> None:
    if x.dim() != 4 or x.shape[1:] != shape:
        raise ValueError(f"x must have shape (B, {', '.join(map(str, shape))}), got {tuple(x.shape)}")


@leaf
def _attend(
    x: Tensor,
    weight_row: Tensor,
    weight_col: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    batches: Tensor | None,
    *,
    momentum: float | None,
    **options: Any,
) -> Tensor:
    """:func:`elementwise_attention`, after one more of ``batches`` is counted; ``momentum`` None: by their number."""
    if batches is not None:
        batches.add_(1)
        if momentum is None:
            momentum = 1.0 / float(batches)
    momentum = 0.0 if momentum is None else momentum
    return elementwise_attention(x, weight_row, weight_col, running_mean, running_var, momentum=momentum, **options)


class ElementwiseAttentionBlock(nn.Module):
    """The paper's attention layer: heads, convolution back to the channels, skip, optional batch norm, ReLU.

    Args:
        channels, size, heads, impl: as in :class:`ElementwiseAttention`.
        batch_norm: whether a batch normalisation follows the skip (the paper's models A, C, E, G).
        skip: whether the input is added to the output of the convolution; the paper's appendix leaves it out.
        std: as in :class:`ElementwiseAttention`.
        kernel_size: of the convolution over the concatenated heads; odd, padded to keep the size.
        bias: whether the convolution has a bias.

    Shapes: input and output (B, C, H, W).

    Raises:
        ValueError: an argument is out of range, or the input has the wrong shape.
    """

    def __init__(
        self,
        channels: int,
        size: tuple[int, int],
        heads: int,
        *,
        batch_norm: bool = False,
        skip: bool = True,
        std: float = 0.02,
        kernel_size: int = 3,
        bias: bool = True,
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and positive, got {kernel_size}")
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.attention = ElementwiseAttention(channels, size, heads, std=std, impl=impl, **options)
        self.conv = nn.Conv2d(heads * channels, channels, kernel_size, padding=kernel_size // 2, bias=bias, **options)
        self.norm = nn.BatchNorm2d(channels, **options) if batch_norm else nn.Identity()
        self.skip = skip

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to x, (B, C, H, W)."""
        out = self.conv(self.attention(x))
        return torch.relu(self.norm(out + x if self.skip else out))


class DualSoftmax(nn.Module):
    """Matching probabilities of a similarity matrix: the softmax over its rows times the softmax over its columns.

    Args:
        temperature: the similarities are divided by it; positive.  No pass over the matrix in memory; divided by it
            before they are multiplied, the features make it cost nothing.
        log: return the logarithm of the probabilities, as LightGlue does.
        impl: implementation of :func:`~fused_attn.row_col_softmax`.

    Shapes: input (B, H, W) or (B, C, H, W), masks (B, H) and (B, W), output as the input.

    Raises:
        TypeError, ValueError: the input has another number of dimensions, or as :func:`~fused_attn.row_col_softmax`.

    Source: Sun et al. 2021, "LoFTR", eq. 2; Lindenberger et al. 2023, "LightGlue", eq. 8.
    """

    def __init__(self, temperature: float = 1.0, log: bool = False, *, impl: str = "auto") -> None:
        super().__init__()
        checks.one_of("impl", impl, _IMPLEMENTATIONS)
        self.temperature, self.log, self.impl = check_options(temperature, log), log, impl

    def forward(self, similarity: Tensor, row_mask: Tensor | None = None, col_mask: Tensor | None = None) -> Tensor:
        """Normalise ``similarity`` along both of its last dimensions, over rows and columns whose masks are True."""
        if similarity.dim() not in (3, 4):
            raise ValueError(f"similarity must have shape (B, H, W) or (B, C, H, W), got {tuple(similarity.shape)}")
        x = similarity if similarity.dim() == 4 else similarity.unsqueeze(1)
        out = row_col_softmax(
            x, None, None, row_mask, col_mask, temperature=self.temperature, log=self.log, impl=self.impl
        )
        return out if similarity.dim() == 4 else out.squeeze(1)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, log={self.log}, impl={self.impl!r}"
