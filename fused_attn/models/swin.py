"""Swin: a hierarchical vision transformer whose attention stays within windows, shifted in every second block."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from ..modules import WindowAttention2d
from ..ops._floor import checks
from ..ops._floor.tracing import leaf
from .drop_path import DropPath
from .features import choose_levels
from .model import Model
from .registry import register_model


class PatchEmbedding(nn.Module):
    """Patches to tokens, (B, in_chans, H, W) -> (B, ceil(H / size), ceil(W / size), dim)."""

    def __init__(self, in_chans: int, dim: int, size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, size, size)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(pad_to_multiple(x, self.proj.stride[0], -2)).permute(0, 2, 3, 1))


class PatchMerging(nn.Module):
    """Four neighbours to one token of twice the channels, (B, H, W, dim) -> (B, ceil(H / 2), ceil(W / 2), 2 * dim)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = pad_to_multiple(x, 2, 1).unflatten(2, (-1, 2)).unflatten(1, (-1, 2))
        # Of the four, those above each other come first, as in the published weights.
        return self.reduction(self.norm(x.permute(0, 1, 3, 4, 2, 5).flatten(3)))


class MLP(nn.Module):
    """Two linear layers on the last axis, with four times its channels between them."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Window attention and a perceptron, each after LayerNorm and beside a shortcut, (B, H, W, dim) -> the same."""

    def __init__(self, dim: int, heads: int, window: int, shift: int, drop_path: float, impl: str) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention2d(dim, heads, window, shift, impl=impl)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        out = self.attn(self.norm1(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        x = x + self.drop_path(out)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Stage(nn.Module):
    """Blocks at one resolution, behind a merging of patches in all stages but the first."""

    def __init__(self, dim: int, heads: int, window: int, drop_path: Sequence[float], merge: bool, impl: str) -> None:
        super().__init__()
        self.downsample = PatchMerging(dim // 2) if merge else None
        self.blocks = nn.Sequential(
            *(Block(dim, heads, window, index % 2 * (window // 2), rate, impl) for index, rate in enumerate(drop_path))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x if self.downsample is None else self.downsample(x))


class Swin(Model):
    """Swin Transformer.

    Args:
        num_classes: outputs of the classifier.
        in_chans: channels of the input images.
        dim: channels of the first stage; every further one has twice as many.
        depths: blocks of each stage.
        heads: heads of each stage; divide its channels.
        window: height and width of a window.
        patch_size: height and width of the patch that makes a token.
        drop_path: probability of dropping a residual branch for a sample in training, in [0, 1), in the last block;
            it grows linearly from 0 in the first.
        features_only: return the maps of the stages instead of logits, and have no classifier.
        out_indices: the stages whose maps ``features_only`` takes, counted from 0; None: all.  Stages past the last of
            them are left out.
        impl: implementation of the attention.

    Shapes: input (B, in_chans, H, W) of any size; output (B, num_classes), or with ``features_only`` a list of maps
        (B, C, H', W') in channels_last memory that ``feature_info`` describes.

    Raises:
        ValueError: an argument is out of range.

    Maps that are no multiple of a window, a pair or a patch are padded with zeros at the bottom and on the right.
    Linear layers and tables start at a truncated normal of standard deviation 0.02, biases at 0.  Parameters have the
    names of timm's, but for those of the classifier.
    Source: Liu et al. 2021, "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows".
    """

    def __init__(
        self,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        heads: Sequence[int] = (3, 6, 12, 24),
        window: int = 7,
        patch_size: int = 4,
        drop_path: float = 0.0,
        features_only: bool = False,
        out_indices: Iterable[int] | None = None,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        checks.positive(dim=dim, window=window, patch_size=patch_size)
        depths, heads = tuple(depths), tuple(heads)
        if not depths or min(depths) < 1:
            raise ValueError(f"depths must be positive numbers, at least one, got {depths}")
        if len(heads) != len(depths):
            raise ValueError(f"heads must have a number for each of the {len(depths)} stages, got {heads}")

        levels = [(dim * 2**stage, patch_size * 2**stage) for stage in range(len(depths))]
        self.out_indices, self.feature_info = choose_levels(levels, out_indices)
        self.patch_embed = PatchEmbedding(in_chans, dim, patch_size)
        total = max(sum(depths) - 1, 1)
        self.layers = nn.ModuleList()
        for stage in range(self.out_indices[-1] + 1 if features_only else len(depths)):
            first = sum(depths[:stage])
            rates = [drop_path * (first + block) / total for block in range(depths[stage])]
            self.layers.append(Stage(levels[stage][0], heads[stage], window, rates, stage > 0, impl))
        self.norm = None if features_only else nn.LayerNorm(levels[-1][0])
        self.head = None if features_only else nn.Linear(levels[-1][0], num_classes)
        self.initialise()

    def initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        x = self.patch_embed(x)
        maps = []
        for index, stage in enumerate(self.layers):
            x = stage(x)
            if self.head is None and index in self.out_indices:
                maps.append(x.permute(0, 3, 1, 2))
        return maps if self.head is None else self.head(self.norm(x).mean((1, 2)))


@leaf
def pad_to_multiple(x: Tensor, size: int, axis: int) -> Tensor:
    """Pad two neighbouring axes at their ends, with zeros, to multiples of ``size``.

    Args:
        axis: the first of the two.
    """
    axis %= x.dim()
    missing = [-length % size for length in x.shape[axis : axis + 2]]
    return F.pad(x, (0, 0) * (x.dim() - axis - 2) + (0, missing[1], 0, missing[0])) if any(missing) else x


register_model("swin_tiny", Swin)
register_model("swin_small", Swin, depths=(2, 2, 18, 2))
register_model("swin_base", Swin, dim=128, depths=(2, 2, 18, 2), heads=(4, 8, 16, 32))
# 32x32 images: maps of 16x16, 8x8 and 4x4 positions; the last is one window.
register_model("swin_cifar", Swin, dim=64, depths=(2, 4, 2), heads=(2, 4, 8), window=4, patch_size=2)
