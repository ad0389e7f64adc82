"""DeiT (vision transformers of 16x16 patches), and its forms with multi-head recurrent layer attention (MRLA)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..modules import LayerCache, MRLABase, MRLALight
from ..ops._floor import checks
from ..ops._floor.positions import Positions, PositionTables
from .coverage import check_size, grid
from .drop_path import DropPath
from .features import choose_levels
from .model import Model
from .registry import register_model

KINDS = (None, "base", "light")
SCHEDULES = ("linear", "constant")
EPS = 1e-6


class SelfAttention(nn.Module):
    """Multi-head self-attention over tokens, (B, N, dim) -> (B, N, dim)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Transformer block: self-attention and a two-layer perceptron, each after LayerNorm and beside a shortcut."""

    def __init__(self, dim: int, heads: int, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=EPS)
        self.attention = SelfAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=EPS)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attention(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class MRLABaseBlock(Block):
    """Block, plus what attention over the cached layers retrieves for the patch tokens.  The class token takes no part:
    it gets its own normalised value."""

    def __init__(self, dim: int, heads: int, drop_path: float, *, dim_per_head: int, impl: str) -> None:
        super().__init__(dim, heads, drop_path)
        self.norm_mrla = nn.LayerNorm(dim, eps=EPS)
        self.mrla = MRLABase(dim, dim_per_head=dim_per_head, impl=impl)

    def forward(self, x: Tensor, size: tuple[int, int], cache: LayerCache) -> Tensor:
        x = super().forward(x)
        normed = self.norm_mrla(x)
        return x + with_class_token(normed, self.mrla(as_map(normed, size), cache))


class MRLALightBlock(Block):
    """Block, plus the light form of layer attention for the patch tokens, whose memory is the block's input.  The class
    token takes no part: it gets its own normalised value."""

    def __init__(self, dim: int, heads: int, drop_path: float, *, dim_per_head: int, impl: str) -> None:
        super().__init__(dim, heads, drop_path)
        self.norm_mrla = nn.LayerNorm(dim, eps=EPS)
        self.norm_shortcut = nn.LayerNorm(dim, eps=EPS)
        self.mrla = MRLALight(dim, dim_per_head=dim_per_head, gelu=True, impl=impl)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        shortcut = self.norm_shortcut(x)
        x = super().forward(x)
        normed = self.norm_mrla(x)
        return x + with_class_token(normed, self.mrla(as_map(normed, size), as_map(shortcut, size)))


def as_map(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """View the patch tokens of (B, 1 + H*W, C) as a map (B, C, H, W)."""
    return tokens[:, 1:].unflatten(1, size).permute(0, 3, 1, 2)


def with_class_token(tokens: Tensor, features: Tensor) -> Tensor:
    """Class token of ``tokens`` before the positions of a map: (B, 1 + H*W, C)."""
    return torch.cat((tokens[:, :1], features.flatten(2).transpose(1, 2)), dim=1)


class DeiT(PositionTables, Model):
    """Vision transformer with a class token and learned positions, optionally with layer attention after every block.

    Args:
        num_classes: outputs of the classifier.
        in_chans: channels of the input images.
        dim: channels of a token.
        heads: heads of the self-attention; divides ``dim``.
        depth: number of blocks.
        image_size: H = W, or (H, W), of the images; multiples of ``patch_size``.
        resize_tables: whether images may have another size, for which the patches' positions are interpolated (bicubic
            with antialiasing, as in timm with ``dynamic_img_size``); multiples of ``patch_size``.
        patch_size: height and width of the patch that makes a token.
        layer_attention: None, ``"base"`` (over all layers of the stage so far) or ``"light"`` (over the current layer,
            plus the weighted input of the block).
        dim_per_head: channels to a head of the layer attention.
        stage_depth: blocks to a stage, for ``"base"``.
        drop_path: probability of dropping a residual branch for a sample in training, in [0, 1).
        drop_path_schedule: ``"linear"``: from 0 in the first block to ``drop_path`` in the last; ``"constant"``.
        features_only: return maps instead of logits, and have no classifier.
        out_indices: the blocks after which ``features_only`` takes a map, counted from 0; None: the last of every four.
            Every map has ``dim`` channels and the stride ``patch_size``; blocks past the last of them are left out.
        impl: implementation of the layer attention.

    Shapes: input (B, in_chans, H, W); output (B, num_classes), or with ``features_only`` a list of maps that
        ``feature_info`` describes.

    Raises:
        ValueError: an argument is out of range, or the images do not have the size ``image_size`` or, with
            ``resize_tables``, are no multiples of ``patch_size``.

    Linear layers, class token and positions start at a truncated normal of standard deviation 0.02, biases at 0.
    Sources: Touvron et al. 2021, "Training data-efficient image transformers"; Fang et al. 2023, "Cross-Layer
    Retrospective Retrieving via Layer Attention", and its code, where the base form has a constant drop-path rate.
    """

    def __init__(
        self,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        dim: int = 192,
        heads: int = 3,
        depth: int = 12,
        image_size: int | tuple[int, int] = 224,
        resize_tables: bool = False,
        patch_size: int = 16,
        layer_attention: str | None = None,
        dim_per_head: int = 16,
        stage_depth: int = 4,
        drop_path: float = 0.0,
        drop_path_schedule: str = "linear",
        features_only: bool = False,
        out_indices: Iterable[int] | None = None,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        checks.positive(heads=heads, depth=depth, stage_depth=stage_depth)
        if dim < 1 or dim % heads:
            raise ValueError(f"dim must be a positive multiple of heads={heads}, got {dim}")
        checks.one_of("layer_attention", layer_attention, KINDS)
        checks.one_of("drop_path_schedule", drop_path_schedule, SCHEDULES)
        size = grid(image_size)
        if patch_size < 1 or size[0] % patch_size or size[1] % patch_size:
            raise ValueError(f"image_size must be a multiple of patch_size={patch_size}, got {image_size}")
        self.image_size, self.size = size, (size[0] // patch_size, size[1] // patch_size)
        self.patch_size, self.resize_tables = patch_size, resize_tables
        self.layer_attention, self.stage_depth = layer_attention, stage_depth

        if out_indices is None:
            out_indices = sorted({*range(3, depth, 4), depth - 1})
        self.out_indices, self.feature_info = choose_levels([(dim, patch_size)] * depth, out_indices)
        self.patches = nn.Conv2d(in_chans, dim, patch_size, patch_size)
        self.class_token = nn.Parameter(torch.empty(1, 1, dim))
        self.positions = nn.Parameter(torch.empty(1, 1 + self.size[0] * self.size[1], dim))
        self.blocks = nn.ModuleList()
        for index in range(self.out_indices[-1] + 1 if features_only else depth):
            linear = drop_path_schedule == "linear"
            rate = drop_path * index / max(depth - 1, 1) if linear else drop_path
            if layer_attention is None:
                self.blocks.append(Block(dim, heads, rate))
            else:
                block = MRLABaseBlock if layer_attention == "base" else MRLALightBlock
                self.blocks.append(block(dim, heads, rate, dim_per_head=dim_per_head, impl=impl))
        self.norm = None if features_only else nn.LayerNorm(dim, eps=EPS)
        self.head = None if features_only else nn.Linear(dim, num_classes)
        self.initialise()

    def initialise(self) -> None:
        for tensor in (self.class_token, self.positions):
            nn.init.trunc_normal_(tensor, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def position_tables(self) -> dict[str, Positions]:
        return {"positions": Positions(self.size, 1, "bicubic", relative=False, antialias=True, prefix=1)}

    def _grid_of(self, x: Tensor) -> tuple[int, int]:
        """Patches of an image along its height and width."""
        if x.dim() != 4 or 0 in x.shape or any(length % self.patch_size for length in x.shape[2:]):
            raise ValueError(
                f"images must have multiples of patch_size={self.patch_size} as height and width, got {tuple(x.shape)}"
            )
        return x.shape[2] // self.patch_size, x.shape[3] // self.patch_size

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        if self.resize_tables:
            size = self._grid_of(x)
            positions = self.position_tables()["positions"].resized(self.positions, size)
        else:
            x = check_size(x, self.image_size, "with resize_tables=True the positions are interpolated")
            size, positions = self.size, self.positions
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.class_token.expand(x.shape[0], -1, -1), x), dim=1) + positions
        maps, cache = [], None
        for index, block in enumerate(self.blocks):
            if self.layer_attention == "base":
                if index % self.stage_depth == 0:
                    cache = LayerCache()
                x = block(x, size, cache)
            elif self.layer_attention == "light":
                x = block(x, size)
            else:
                x = block(x)
            if self.head is None and index in self.out_indices:
                maps.append(as_map(x, size))
        return maps if self.head is None else self.head(self.norm(x)[:, 0])


_SIZES = {"tiny": {"dim": 192, "heads": 3}, "small": {"dim": 384, "heads": 6}, "base": {"dim": 768, "heads": 12}}
for _size, _widths in _SIZES.items():
    register_model(f"deit_{_size}", DeiT, **_widths)
    register_model(f"mrla_base_deit_{_size}", DeiT, layer_attention="base", drop_path_schedule="constant", **_widths)
    register_model(f"mrla_light_deit_{_size}", DeiT, layer_attention="light", **_widths)
