"""Modules: attention over the layers of a network, as in SA-ResNet and MRLA."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._floor import checks
from .._floor.dispatch import IMPLEMENTATIONS
from .._floor.tracing import leaf
from .api import layer_attention
from .cache import LayerCache
from .gated_shortcut import gated_shortcut

VALUES = ("pad", "project")


class LayerAttention(nn.Module):
    """Weighted sum of all layers of a network, with weights per image from attention of the last layer over all.

    ``key_i = linear_i(pooled layer_i)``, ``query = key_L`` and
    ``out = sum_i softmax_i(query.key_i / sqrt(key_dim)) value_i``, where value_i is layer i, average-pooled to the grid
    of the last layer and widened to its channels.

    The input's form decides the output's.  Pooling commutes with the weighted sum, so a head that pools (global average
    and classifier) can work on pooled layers throughout; the result is the global average of what the maps would give,
    exactly where the last layer's grid divides those of the others.

    What the paper leaves open, the choice made, and the other one as an option:

    - *How layers of 16 and 32 channels become values of 64.*  ``values="pad"``: zeros for the channels that are
      missing, which is what the network's own shortcuts (option A) do, and takes no parameters.  ``"project"``: a 1x1
      convolution without bias in each layer that needs it.
    - *What a key sees.*  "We apply a linear transformation on" the average-pooled layer.  ``key_grid=1``: its global
      average, 64 numbers.  ``key_grid=(h, w)``: all positions of the layer pooled to an h x w grid, C*h*w numbers.
    - *What counts as a layer* is up to the caller: :class:`~fused_attn.models.cifar_resnet.SAResNet` takes the outputs
      of residual blocks, or all convolutions.

    Every layer has a key transformation of its own, because the paper's f_K takes the number of the layer.

    Args:
        channels: channels of every layer, first to last.
        key_dim: dimension of query and keys.
        values: ``"pad"`` or ``"project"``; with "pad", no layer may have more channels than the last.
        key_grid: positions, or (h, w), that a key sees.
        impl: implementation of the op; not part of the state dict.

    Shapes: input L tensors (B, C_i), output (B, C_L); or input L maps (B, C_i, H_i, W_i), output (B, C_L, H_L, W_L).

    Raises:
        ValueError: an argument is out of range, or the layers do not have the shapes that it announced.

    Source: Luo, "Self-Attentive Layer Aggregation", eq. 1-4 and section 3.
    """

    def __init__(
        self,
        channels: Sequence[int],
        *,
        key_dim: int = 32,
        values: str = "pad",
        key_grid: int | tuple[int, int] = 1,
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.channels = tuple(channels)
        if not self.channels or min(self.channels) < 1:
            raise ValueError(f"channels must be at least one positive number, got {self.channels}")
        checks.positive(key_dim=key_dim)
        checks.one_of("values", values, VALUES)
        width = self.channels[-1]
        if values == "pad" and max(self.channels) > width:
            raise ValueError(f"channels must not exceed those of the last layer with values='pad', got {self.channels}")
        self.key_grid = (key_grid, key_grid) if isinstance(key_grid, int) else (*key_grid,)
        if len(self.key_grid) != 2 or min(self.key_grid) < 1:
            raise ValueError(f"key_grid must be a positive number or two of them (h, w), got {key_grid}")
        checks.one_of("impl", impl, IMPLEMENTATIONS)
        self.impl = impl
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        positions = self.key_grid[0] * self.key_grid[1]
        self.keys = nn.ModuleList(nn.Linear(width * positions, key_dim, **options) for _ in self.channels)
        self.projections = nn.ModuleList(
            nn.Linear(layer_channels, width, bias=False, **options)
            if values == "project" and layer_channels != width
            else nn.Identity()
            for layer_channels in self.channels
        )

    def forward(self, layers: Sequence[Tensor]) -> Tensor:
        """Sum L pooled layers, (B, C_i) -> (B, C_L), or L maps, (B, C_i, H_i, W_i) -> (B, C_L, H_L, W_L)."""
        _check_layers(layers, self.channels, self.key_grid)
        values, keys = [], []
        for x, channels, projection, key in zip(layers, self.channels, self.projections, self.keys, strict=True):
            value = self._widen(_pool_like(x, layers[-1]), channels, projection)
            pooled = _pool(x, self.key_grid)
            seen = value if pooled is x else self._widen(pooled, channels, projection)
            keys.append(key(seen.flatten(1)).unsqueeze(1))  # one group
            values.append(value)
        return layer_attention(keys[-1], keys, values, impl=self.impl)

    def _widen(self, x: Tensor, channels: int, projection: nn.Module) -> Tensor:
        if not isinstance(projection, nn.Identity):  # a linear layer, or what was put in its place
            return projection(x.movedim(1, -1)).movedim(-1, 1)
        x = projection(x)  # hooks on it run
        missing = self.channels[-1] - channels
        return _pad_channels(x, missing) if missing else x

    def extra_repr(self) -> str:
        return f"layers={len(self.channels)}, key_grid={self.key_grid}, impl={self.impl!r}"


@leaf
def _check_layers(layers: Sequence[Tensor], channels: Sequence[int], key_grid: tuple[int, ...]) -> None:
    if len(layers) != len(channels):
        raise ValueError(f"layers must be {len(channels)} tensors, got {len(layers)}")
    dims = {x.dim() for x in layers}
    if dims not in ({2}, {4}):
        raise ValueError(f"layers must all have 2 dimensions (B, C), or all 4 (B, C, H, W), got {sorted(dims)}")
    if dims == {2} and key_grid != (1, 1):
        raise ValueError(f"layers must be maps (B, C, H, W) for key_grid={key_grid}, got pooled ones (B, C)")
    for index, (x, layer_channels) in enumerate(zip(layers, channels, strict=True)):
        if x.shape[1] != layer_channels:
            raise ValueError(f"layers[{index}] must have {layer_channels} channels, got shape {tuple(x.shape)}")


@leaf
def _pool(x: Tensor, grid: Any) -> Tensor:
    """A map pooled to a grid; a pooled layer itself."""
    return x if x.dim() == 2 else F.adaptive_avg_pool2d(x, grid)


@leaf
def _pool_like(x: Tensor, last: Tensor) -> Tensor:
    """A layer at the grid of another, or itself where it is pooled."""
    return _pool(x, tuple(last.shape[2:]))


@leaf
def _pad_channels(x: Tensor, missing: int) -> Tensor:
    return F.pad(x, (0, 0) * (x.dim() - 2) + (0, missing))


class _MRLA(nn.Module):
    """Query, key and value of MRLA.

    Query and key are one convolution each over the channels of the global average, as in ECA-Net, of kernel size
    (log2(C) + 1) / 2, rounded down to an integer and up from that to an odd one; the value is a depthwise 3x3
    convolution; none has a bias.
    """

    def __init__(
        self,
        channels: int,
        dim_per_head: int,
        impl: str,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        if dim_per_head < 1 or channels < 1 or channels % dim_per_head:
            raise ValueError(f"channels must be a positive multiple of dim_per_head={dim_per_head}, got {channels}")
        self.channels, self.heads, self.scale = channels, channels // dim_per_head, dim_per_head**-0.5
        checks.one_of("impl", impl, IMPLEMENTATIONS)
        self.impl = impl
        kernel = int((math.log2(channels) + 1) / 2)
        kernel += 1 - kernel % 2
        options: dict[str, Any] = {"bias": False, "device": device, "dtype": dtype}
        self.query = nn.Conv1d(1, 1, kernel, padding=kernel // 2, **options)
        self.key = nn.Conv1d(1, 1, kernel, padding=kernel // 2, **options)
        self.value = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, **options)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, C, H, W) -> query and key (B, heads, C / heads), value (B, C, H, W)."""
        checks.feature_map(x, self.channels)
        pooled = x.mean(dim=(2, 3)).unsqueeze(1)
        query, key = (conv(pooled).view(x.shape[0], self.heads, -1) for conv in (self.query, self.key))
        return query, key, self.value(x)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, impl={self.impl!r}"


class MRLABase(_MRLA):
    """Multi-head recurrent layer attention over all layers of a stage so far.

    ``out_t = sum_{s<=t} softmax_s(query_t.key_s / sqrt(d)) value_s`` per head.  Keys and values of earlier layers are
    in a :class:`~fused_attn.LayerCache` that the caller makes for every stage and every forward pass::

        cache = LayerCache()
        for block, attention in zip(stage, attentions):
            x = block(x)
            x = x + norm(attention(x, cache)).relu()

    Nothing is concatenated, and a stage of T layers saves T values for its backward pass.

    Args:
        channels: channels of the layers of the stage.
        dim_per_head: d, channels of a head; divides ``channels``.
        impl: implementation of the op; not part of the state dict.

    Shapes: input and output (B, channels, H, W); those of one cache are all alike.

    Raises:
        ValueError: an argument is out of range, or the input does not have ``channels`` channels.

    Source: Fang et al. 2023, "Cross-Layer Retrospective Retrieving via Layer Attention", MRLA-base.
    """

    def __init__(
        self,
        channels: int,
        *,
        dim_per_head: int = 16,
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(channels, dim_per_head, impl, device, dtype)

    def forward(self, x: Tensor, cache: LayerCache) -> Tensor:
        """Add the layer x to the cache and attend over all that are in it."""
        query, key, value = self.project(x)
        cache.append(key, value)
        return cache.attend(query, scale=self.scale, impl=self.impl)


class MRLALight(_MRLA):
    """Multi-head recurrent layer attention, light form: what earlier layers gave is weighted instead of recomputed.

    ``out_t = sigmoid(query_t.key_t / sqrt(d)) value_t + weight * out_{t-1}``, with a gate per head and a learned weight
    per channel, which starts at a standard normal distribution.  As in the authors' code, out_{t-1} is the shortcut of
    the block, to which the earlier attention was added.

    Args:
        channels: channels of the layer.
        dim_per_head: d, channels of a head; divides ``channels``.
        gelu: whether the value passes a GELU, as in the vision transformers.
        impl: implementation of the gated sum; not part of the state dict.

    Shapes: input, shortcut and output (B, channels, H, W).

    Raises:
        ValueError: an argument is out of range, or an input does not have ``channels`` channels.

    Source: Fang et al. 2023, "Cross-Layer Retrospective Retrieving via Layer Attention", MRLA-light.
    """

    def __init__(
        self,
        channels: int,
        *,
        dim_per_head: int = 32,
        gelu: bool = False,
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(channels, dim_per_head, impl, device, dtype)
        self.gelu = gelu
        self.shortcut_weight = nn.Parameter(torch.empty(channels, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw a fresh weight of the shortcut; the layers have this method themselves."""
        nn.init.normal_(self.shortcut_weight)

    def forward(self, x: Tensor, shortcut: Tensor) -> Tensor:
        """Gate the layer x, and add the weighted shortcut."""
        query, key, value = self.project(x)
        if self.gelu:
            value = F.gelu(value)
        gate = torch.sigmoid(self.scale * (query * key).sum(dim=-1))
        return gated_shortcut(gate, value, self.shortcut_weight, shortcut, impl=self.impl)
